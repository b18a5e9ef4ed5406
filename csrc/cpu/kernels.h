// The list of CPU kernels. Each is compiled once per ISA level, in a namespace of its own; dispatch.h hands out the tables.
// A kernel is a plain function over views: it never allocates, throws, prints or reads the environment; only the threads it
// asks for may fail to start (parallel.h).
#pragma once
#include "core/args.h"
#include "core/limits.h"
#include "core/sampling.h"
#include "core/training.h"
#include "cpu/parallel.h"

#define PYLLM_CPU_KERNELS(X)                            \
  X(pack, PackArgs)                                     \
  X(pack_quantized, PackQuantizedArgs)                  \
  X(matmul, MatmulArgs)                                 \
  X(norm, NormArgs)                                     \
  X(activation, ActivationArgs)                         \
  X(axpby, AxpbyArgs)                                   \
  X(clamp, ClampArgs)                                   \
  X(embedding, EmbeddingArgs)                           \
  X(gather, GatherArgs)                                 \
  X(pool, PoolArgs)                                     \
  X(gather_columns, GatherColumnsArgs)                  \
  X(rope_angles, RopeAnglesArgs)                        \
  X(rope, RopeArgs)                                     \
  X(kv_write, KvWriteArgs)                              \
  X(attention, AttentionArgs)                           \
  X(sample, SampleArgs)                                 \
  X(logprobs, LogprobsArgs)                             \
  X(unpack, UnpackArgs)                                 \
  X(matmul_dx, MatmulDxArgs)                            \
  X(matmul_dw, MatmulDwArgs)                            \
  X(column_sum, ColumnSumArgs)                          \
  X(activation_backward, ActivationBackwardArgs)        \
  X(clamp_backward, ClampBackwardArgs)                  \
  X(adamw, AdamWArgs)                                   \
  X(square_norm, SquareNormArgs)                        \
  X(norm_backward, NormBackwardArgs)                    \
  X(embedding_backward, EmbeddingBackwardArgs)          \
  X(gather_backward, GatherBackwardArgs)                \
  X(pool_backward, PoolBackwardArgs)                    \
  X(gather_columns_backward, GatherColumnsBackwardArgs) \
  X(attention_backward, AttentionBackwardArgs)          \
  X(dropout, DropoutArgs)                               \
  X(cross_entropy, CrossEntropyArgs)                    \
  X(sigmoid_cross_entropy, ElementLossArgs)             \
  X(squared_error, ElementLossArgs)                     \
  X(limits, LimitsArgs)

namespace pyllm::cpu {

template <class Args>
using Kernel = void (*)(const Args&, Parallel&);

struct KernelTable {
#define X(name, Args) Kernel<Args> name;
  PYLLM_CPU_KERNELS(X)
#undef X
};

// Scratch memory a call needs, in bytes, on this many threads; the caller puts it into args.workspace, 64-byte aligned.
int64_t workspace_bytes(const MatmulArgs& args, int threads);
int64_t workspace_bytes(const MatmulDxArgs& args, int threads);
int64_t workspace_bytes(const MatmulDwArgs& args, int threads);
int64_t workspace_bytes(const SquareNormArgs& args, int threads);
int64_t workspace_bytes(const AttentionArgs& args, int threads);
int64_t workspace_bytes(const SampleArgs& args, int threads);
int64_t workspace_bytes(const NormBackwardArgs& args, int threads);
int64_t workspace_bytes(const AttentionBackwardArgs& args, int threads);

// Kernels that need none.
template <class Args>
int64_t workspace_bytes(const Args&, int) {
  return 0;
}

}  // namespace pyllm::cpu
