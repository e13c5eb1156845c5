// A CUDA block on one CPU thread: every CUDA thread is a fiber that runs until it must wait for others.
//
// A seed permutes the order of blocks and, at every step, the choice of the fiber that runs next: with a
// barrier missing, some order reads what is not written yet (shared memory starts as NaN). Wrong use is an
// exception that names kernel, block and thread. Not shown: races inside a warp's step, memory ordering,
// speed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

constexpr int kWarpSize = 32;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct Settings {
  uint64_t seed = 0;        // 0: blocks and threads in their natural order
  int multiprocessors = 2;  // what kernels are told
  int resident_blocks = 2;  // blocks that run interleaved; a cooperative launch has all of them resident
};
Settings& settings();

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where in the source a barrier or a shuffle stands.
using Site = std::source_location;

struct Exchange {
  std::array<uint64_t, kWarpSize> value;
};

struct SharedObject {
  const void* site;
  std::unique_ptr<std::byte[]> bytes;
};

struct Grid {
  dim3 grid_dim, block_dim;
  std::function<void()> body;
  std::string kernel;
  size_t dynamic_bytes = 0;
};

struct Fiber;

struct Block {
  Grid* grid;
  dim3 index;
  std::vector<Fiber> fibers;
  std::vector<SharedObject> shared;
  std::unique_ptr<std::byte[]> dynamic;
  int waiting = 0, done = 0, votes = 0, last_votes = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  size_t groups_since;  // its own one included; 0 while that is open
};

enum class Wait { kNone, kBlock, kWarp, kGrid };

struct Fiber {
  Block* block = nullptr;
  dim3 thread;
  int number = 0;  // in the block
  Wait wait = Wait::kNone;
  Site site;
  uint32_t mask = 0;
  uint64_t value = 0;
  Exchange received{};
  std::vector<Copy> copies;
  bool done = false;
  void* context = nullptr;  // where it stopped
  char* stack = nullptr;
};

Fiber* current();
inline int lane() { return current()->number % kWarpSize; }

// The sum of all threads' votes.
int block_barrier(Site site, int vote);
void grid_barrier(Site site = Site::current());
// What every lane of the mask brought.
Exchange exchange(Site site, uint32_t mask, uint64_t value);
void check_active(Site site, uint32_t mask, int source);
void check_aligned(const void* pointer, size_t bytes);
// Not one bit more aligned than asked for: on a GPU other objects may lie before it.
void* shared_bytes(const void* site, size_t bytes, size_t alignment);
void* dynamic_shared();

template <typename T>
T& shared(const void* site) {
  static_assert(alignof(T) <= 16);
  return *static_cast<T*>(shared_bytes(site, sizeof(T), alignof(T)));
}

// Runs the grid to its end, or throws Fault.
void run(Grid& grid, bool cooperative);
std::string kernel_name(const void* function);

}  // namespace emulator
