#include "cpu/dispatch.h"

#include <atomic>
#include <cstring>
#include <iterator>

#include "cpu/cores.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyllm {

#define PYLLM_DECLARE(ns)            \
  namespace ns {                     \
  const cpu::KernelTable& kernels(); \
  }
PYLLM_DECLARE(isa_baseline)
PYLLM_DECLARE(isa_avx2)
PYLLM_DECLARE(isa_avx512)
PYLLM_DECLARE(isa_avx512_bf16)
PYLLM_DECLARE(isa_amx_bf16)

namespace cpu {
namespace {

struct Registers {
  uint32_t a, b, c, d;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r{0, 0, 0, 0};
  if (leaf <= __get_cpuid_max(0, nullptr)) __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
  return r;
}

Registers cpuid_extended(uint32_t leaf) {
  Registers r{0, 0, 0, 0};
  if (leaf <= __get_cpuid_max(0x80000000u, nullptr)) __cpuid_count(leaf, 0, r.a, r.b, r.c, r.d);
  return r;
}

bool all(uint32_t value, uint32_t bits) { return (value & bits) == bits; }
constexpr uint32_t bit(int n) { return 1u << n; }

// The register state that the operating system saves (XCR0); 0 without OSXSAVE.
uint32_t os_state() {
  if (!all(cpuid(1, 0).c, bit(27))) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Bits after Intel's manual, volume 2, CPUID.
bool has_baseline() {  // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT; LAHF
  return all(cpuid(1, 0).c, bit(0) | bit(9) | bit(13) | bit(19) | bit(20) | bit(23)) &&
         all(cpuid_extended(0x80000001u).c, bit(0));
}

bool has_avx2() {  // FMA, MOVBE, AVX, F16C; BMI1, AVX2, BMI2; LZCNT; XMM and YMM saved
  return has_baseline() && all(cpuid(1, 0).c, bit(12) | bit(22) | bit(28) | bit(29)) &&
         all(cpuid(7, 0).b, bit(3) | bit(5) | bit(8)) && all(cpuid_extended(0x80000001u).c, bit(5)) &&
         all(os_state(), 0x6);
}

bool has_avx512() {  // F, DQ, CD, BW, VL; opmask and ZMM saved
  return has_avx2() && all(cpuid(7, 0).b, bit(16) | bit(17) | bit(28) | bit(30) | bit(31)) && all(os_state(), 0xe6);
}

bool has_avx512_bf16() {  // VNNI; BF16
  return has_avx512() && all(cpuid(7, 0).c, bit(11)) && all(cpuid(7, 1).a, bit(5));
}

// Tiles are 8 KB of state a thread, which Linux (5.16 and later) saves only for processes that have asked. Older kernels
// and some sandboxes refuse.
bool tiles_granted() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx_bf16() {  // AMX-BF16, AMX-TILE; tile configuration and data saved
  return has_avx512_bf16() && all(cpuid(7, 0).d, bit(22) | bit(24)) && all(os_state(), bit(17) | bit(18)) &&
         tiles_granted();
}

const IsaLevel kLevels[] = {
    {"amx_bf16", "AMX with BF16 beside AVX-512 with BF16 and VNNI, and the operating system's leave to use its tiles",
     has_amx_bf16, isa_amx_bf16::kernels},
    {"avx512_bf16", "AVX-512 F/BW/CD/DQ/VL with BF16 and VNNI", has_avx512_bf16, isa_avx512_bf16::kernels},
    {"avx512", "AVX-512 F/BW/CD/DQ/VL", has_avx512, isa_avx512::kernels},
    {"avx2", "AVX2, FMA, F16C and BMI", has_avx2, isa_avx2::kernels},
    {"baseline", "x86-64-v2 (SSE4.2)", has_baseline, isa_baseline::kernels},
};

const IsaLevel* best() {
  for (const IsaLevel& level : kLevels)
    if (level.supported()) return &level;
  return std::end(kLevels) - 1;
}

std::atomic<const IsaLevel*> active{nullptr};

}  // namespace

IsaList isa_levels() { return {kLevels, int(sizeof kLevels / sizeof kLevels[0])}; }

const IsaLevel& active_isa() {
  const IsaLevel* level = active.load(std::memory_order_acquire);
  if (!level) {
    const IsaLevel* chosen = best();
    active.compare_exchange_strong(level, chosen, std::memory_order_acq_rel);
    if (!level) level = chosen;
  }
  return *level;
}

bool set_isa(const char* name) {
  for (const IsaLevel& level : kLevels) {
    if (std::strcmp(level.name, name) == 0 && level.supported()) {
      active.store(&level, std::memory_order_release);
      return true;
    }
  }
  return false;
}

bool fast_bf16_dots() { return vectors_dot_bf16_fast() || std::strcmp(active_isa().name, "amx_bf16") == 0; }

}  // namespace cpu
}  // namespace pyllm
