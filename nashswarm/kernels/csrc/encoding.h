// What the encoders of paths share: how their functions are compiled, and vectors of sixteen numbers.
#pragma once
#include <cstdint>

#define INLINE __attribute__((always_inline)) inline
#define EXPORTED __attribute__((visibility("default")))
#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDENED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDENED
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

INLINE Floats fill(float value) { return Floats{} + value; }

}  // namespace
