// Sizes of the attention kernel's scratch memory, shared by the kernel and workspace_bytes. They depend on shapes only,
// for lengths change between replays of a recorded call.
//
// The workspace is [plans][partials][threads]: one plan per sequence, `slots` partial results of one query row and key
// block, and each thread's scratch. All parts are 64-byte aligned.
#pragma once
#include "core/args.h"

namespace pyllm::cpu {

// Query rows (tokens x heads of a group) that one work item holds: enough that keys widened to float32 are used often,
// few enough that queries, accumulators and a block of keys and values stay in a 1 MB L2 at every head size.
constexpr int64_t kQueryRows = 96;

// How one sequence is cut into work items, made at the start of each call.
struct SequencePlan {
  int64_t first_item;           // the sequence's items are [first_item, next plan's first_item)
  int64_t first_slot;           // of its partial results
  int64_t first_row;            // its place among the rows that are merged from partial results
  int64_t sink_blocks;          // key blocks before first_block whose sinks its rows see
  int64_t first_block, blocks;  // key blocks from first_block on that its rows see, and those in all
  int64_t tiles, pieces;        // of query rows; of key/value heads
  bool split;                   // an item takes one key block; else it walks them all
};

struct AttentionWorkspace {
  int64_t slots;          // partial results: of one query token and one key block
  int64_t slot_floats;    // per head: max, sum, weighted values
  int64_t tile_floats;    // accumulators and queries of one tile
  int64_t thread_floats;  // a thread's scratch: those, and a page's numbers
  int64_t plan_bytes, partial_bytes, bytes;
};

// A partial result of one head is [max, sum, 14 unused, values[Ep]].
constexpr int64_t kPartialHeader = 16;
// Rows of per-thread scratch with one float per query row: see Scratch in kernels/attention.cc.
constexpr int64_t kRowVectors = 15, kSumLanes = 16;

static inline AttentionWorkspace attention_workspace(const AttentionArgs& a, int64_t threads) {
  const int64_t Ep = a.cache.padded_head();
  const int64_t blocks = (a.table_width * kBlockTokens + kKeyBlock - 1) / kKeyBlock;
  AttentionWorkspace w;
  // One sequence's decode step can always be split over its keys; beyond that a bounded number of partials is enough to
  // balance the threads, and what does not fit is walked by one thread.
  const int64_t wanted = a.rows * blocks, most = blocks + 32 * threads;
  w.slots = wanted < most ? wanted : most;
  w.slot_floats = kPartialHeader + Ep;
  w.tile_floats = kQueryRows * (3 * Ep + kSumLanes + kRowVectors);
  w.thread_floats = w.tile_floats + kBlockTokens * 3 * Ep;
  w.plan_bytes = round_up((a.sequences + 1) * int64_t(sizeof(SequencePlan)), 64);
  w.partial_bytes = w.slots * a.heads * w.slot_floats * 4;
  w.bytes = w.plan_bytes + w.partial_bytes + threads * w.thread_floats * 4;
  return w;
}

// The backward pass takes keys in spans of kSpanPages pages, and queries in blocks of kQueryBlock. Its workspace is
// [partials][biases][threads]: where heads share keys, each head's dk and then dv [S, H, E]; each sequence's dbias; and
// each thread's scratch.
constexpr int64_t kSpanPages = 4, kQueryBlock = 64;

struct AttentionBackwardWorkspace {
  int64_t partial_floats;  // of dk, and as many of dv
  int64_t bias_floats;
  int64_t thread_floats;
  int64_t bytes;
};

static inline AttentionBackwardWorkspace attention_backward_workspace(const AttentionBackwardArgs& a, int64_t threads) {
  const int64_t Ep = a.cache.padded_head();
  AttentionBackwardWorkspace w;
  w.partial_floats = a.heads > a.cache.kv_heads ? round_up(a.keys * a.heads * a.cache.head_size, 16) : 0;
  w.bias_floats = a.dbias ? round_up(a.sequences * a.heads * (2 * a.scores.reach + 1), 16) : 0;
  w.thread_floats = (5 * kSpanPages * kBlockTokens + 3 * kQueryBlock) * Ep + kQueryBlock * (2 * kBlockTokens + 4);
  w.bytes = (2 * w.partial_floats + w.bias_floats + threads * w.thread_floats) * 4;
  return w;
}

}  // namespace pyllm::cpu
