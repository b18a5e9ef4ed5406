// Which instruction-set levels this build has and this machine can run, and the one in use.
#pragma once
#include "cpu/kernels.h"

namespace pyllm::cpu {

struct IsaLevel {
  const char* name;
  const char* requires_;  // for messages
  bool (*supported)();    // CPU and operating system
  const KernelTable& (*kernels)();
};

struct IsaList {
  const IsaLevel* begin_;
  int count;
  const IsaLevel* begin() const { return begin_; }
  const IsaLevel* end() const { return begin_ + count; }
};

// All levels of this build, best first.
IsaList isa_levels();

// The level in use: the best supported one until set_isa chooses.
const IsaLevel& active_isa();

// Chooses a level by name. False where the name is unknown or the machine cannot run it.
bool set_isa(const char* name);

// Whether the bf16 dot products of the level in use, tiles included, outrun float32 multiply-adds, where it has any.
bool fast_bf16_dots();

}  // namespace pyllm::cpu
