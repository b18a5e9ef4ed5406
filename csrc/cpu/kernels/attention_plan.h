// How the queries of a batch are cut into work items.
//
// A work item is a tile of query rows of one sequence, some key/value heads, and a range of key blocks. Sequences are cut
// so that no item is more than a quarter of a thread's share: first over key blocks, as long as there is room for partial
// results, then over heads.
#pragma once
#include "cpu/attention_workspace.h"
#include "cpu/kernels/attention_rule.h"

namespace pyllm::PYLLM_ISA {

using cpu::kQueryRows;
using cpu::SequencePlan;

struct Item {
  int64_t sequence;
  int64_t row, rows;            // query rows of a head: row / group is the token, row % group the head of the group
  int64_t head, heads;          // key/value heads
  int64_t first_key, last_key;  // whole key blocks, or the end of what is visible
  bool split;
};

class AttentionPlan {
 public:
  // `plans` has room for one more than the sequences, `slots` are the partial results that fit.
  AttentionPlan(const AttentionArgs& args, SequencePlan* plans, int64_t slots)
      : a(args), plans_(plans), slots_(slots), group_(args.heads / args.cache.kv_heads) {}

  void make(int64_t threads) {
    int64_t work = 0;
    for (int64_t b = 0; b < a.sequences; ++b) {
      SequencePlan& p = plans_[b];
      const int64_t n = rows_of(b);
      p.first_block = n > 0 ? SequenceRule(a, b).seen(0).first / kKeyBlock : 0;
      p.sink_blocks = min_of(p.first_block, divide_up(a.rule.sinks, kKeyBlock));
      p.blocks = n > 0 ? divide_up(a.lengths[b], kKeyBlock) - p.first_block + p.sink_blocks : 0;
      work += p.blocks * n * a.heads;
    }
    const int64_t share = max_of(1, work / (4 * threads));
    int64_t items = 0, slots = 0, merged_rows = 0;
    for (int64_t b = 0; b < a.sequences; ++b) {
      SequencePlan& p = plans_[b];
      const int64_t n = rows_of(b);
      p.first_item = items;
      p.first_slot = slots;
      p.first_row = merged_rows;
      p.split = false;
      if (n == 0) continue;
      const int64_t heads = heads_per_tile(b), tile_rows = min_of(kQueryRows, n * group_);
      p.tiles = divide_up(n * group_, kQueryRows);
      const int64_t cost = tile_rows * heads * p.blocks;
      p.split = threads > 1 && p.blocks > 1 && cost > share && slots + n * p.blocks <= slots_;
      const int64_t item_cost = p.split ? tile_rows * heads : cost;
      p.pieces = divide_up(a.cache.kv_heads, heads);
      if (threads > 1 && item_cost > share) p.pieces = min_of(a.cache.kv_heads, p.pieces * divide_up(item_cost, share));
      items += p.tiles * p.pieces * (p.split ? p.blocks : 1);
      if (p.split) {
        slots += n * p.blocks;
        merged_rows += n;
      }
    }
    plans_[a.sequences].first_item = items;
    plans_[a.sequences].first_row = merged_rows;
  }

  int64_t items() const { return plans_[a.sequences].first_item; }
  int64_t merged_rows() const { return plans_[a.sequences].first_row; }

  Item item(int64_t i) const {
    Item t;
    t.sequence = find(i, &SequencePlan::first_item);
    const SequencePlan& p = plans_[t.sequence];
    i -= p.first_item;
    const int64_t tile = i % p.tiles, piece = i / p.tiles % p.pieces, block = i / p.tiles / p.pieces;
    t.row = tile * kQueryRows;
    t.rows = min_of(kQueryRows, rows_of(t.sequence) * group_ - t.row);
    t.head = piece * a.cache.kv_heads / p.pieces;
    t.heads = (piece + 1) * a.cache.kv_heads / p.pieces - t.head;
    t.split = p.split;
    t.first_key = block_at(t.sequence, block) * kKeyBlock;
    t.last_key = p.split ? t.first_key + kKeyBlock : a.lengths[t.sequence];
    return t;
  }

  // Of the i-th row whose key blocks went to different items: its sequence and token.
  void merged_row(int64_t i, int64_t& sequence, int64_t& token) const {
    sequence = find(i, &SequencePlan::first_row);
    token = i - plans_[sequence].first_row;
  }

  // Key blocks that the rows of a sequence see, and the i-th of them.
  int64_t blocks(int64_t sequence) const { return plans_[sequence].blocks; }
  int64_t block_at(int64_t sequence, int64_t i) const {
    const SequencePlan& p = plans_[sequence];
    return i < p.sink_blocks ? i : p.first_block + i - p.sink_blocks;
  }

  // The partial result of a token and key block.
  int64_t slot(int64_t sequence, int64_t token, int64_t block) const {
    const SequencePlan& p = plans_[sequence];
    const int64_t i = block < p.first_block ? block : block - p.first_block + p.sink_blocks;
    return p.first_slot + token * p.blocks + i;
  }

 private:
  int64_t rows_of(int64_t b) const { return int64_t(a.starts[b + 1]) - a.starts[b]; }

  // Query rows that fit into a tile, as whole heads where a sequence has few rows: heads of one item.
  int64_t heads_per_tile(int64_t b) const {
    const int64_t rows = rows_of(b) * group_;
    return rows >= kQueryRows ? 1 : min_of(a.cache.kv_heads, kQueryRows / rows);
  }

  // The last sequence whose `first` is not beyond i.
  int64_t find(int64_t i, int64_t SequencePlan::* first) const {
    int64_t low = 0, high = a.sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (plans_[middle].*first <= i ? low : high) = middle;
    }
    return low;
  }

  const AttentionArgs& a;
  SequencePlan* plans_;
  const int64_t slots_, group_;
};

}  // namespace pyllm::PYLLM_ISA
