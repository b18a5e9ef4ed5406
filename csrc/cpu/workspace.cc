// Scratch sizes of the kernels that need scratch, the same at every ISA level.
#include "cpu/attention_workspace.h"
#include "cpu/kernels.h"
#include "cpu/kernels/matmul_plan.h"
#include "cpu/kernels/norm_plan.h"

namespace pyllm::cpu {

int64_t workspace_bytes(const MatmulArgs& args, int threads) {
  return args.w.integers() ? matmul_plan::int_workspace_bytes(args.rows, args.w.k, threads)
                           : matmul_plan::workspace_bytes(args.rows, args.w.k, threads);
}

int64_t workspace_bytes(const MatmulDxArgs& a, int threads) {
  return matmul_plan::dx_workspace_bytes(a.rows, a.w.panels() * a.w.parts, threads);
}

int64_t workspace_bytes(const MatmulDwArgs& a, int threads) {
  return matmul_plan::dw_workspace_bytes(a.rows, a.dw.k, threads);
}

int64_t workspace_bytes(const SquareNormArgs& a, int) {
  return matmul_plan::divide_up(a.count, kSquareChunk) * int64_t(sizeof(double));
}

int64_t workspace_bytes(const AttentionArgs& args, int threads) { return attention_workspace(args, threads).bytes; }

int64_t workspace_bytes(const SampleArgs& a, int threads) {
  return threads * sample_floats(a.vocab) * int64_t(sizeof(float));
}

int64_t workspace_bytes(const NormBackwardArgs& a, int) { return NormPlan(a.rows * a.heads, a.dim).workspace_bytes(); }

int64_t workspace_bytes(const AttentionBackwardArgs& args, int threads) {
  return attention_backward_workspace(args, threads).bytes;
}

}  // namespace pyllm::cpu
