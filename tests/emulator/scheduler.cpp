#include "scheduler.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

struct Machine {
  Grid* grid = nullptr;
  bool cooperative = false;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Fiber*> runnable;
  std::vector<char*> free_stacks;
  Fiber* running = nullptr;
  void* main_context = nullptr;
  std::exception_ptr fault;

  ~Machine() {
    for (char* stack : free_stacks) free(stack);
  }
};

Machine machine;

void fiber_main() noexcept;

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack that is left and takes them from the one that is entered.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

void prepare(Fiber& fiber) {
  auto** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;  // where a caller's frame would begin; leaves the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context = top;
}
void switch_context(void** save, void* load) { emulator_switch(save, load); }
void release_context(Fiber&) {}
#else
void prepare(Fiber& fiber) {
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, reinterpret_cast<void (*)()>(&fiber_main), 0);
  fiber.context = context;
}
void switch_context(void** save, void* load) {
  static ucontext_t main_context;
  if (*save == nullptr) *save = &main_context;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
void release_context(Fiber& fiber) { delete static_cast<ucontext_t*>(std::exchange(fiber.context, nullptr)); }
#endif

void to_fiber(Fiber& fiber) {
  machine.running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStackBytes);
#endif
  switch_context(&machine.main_context, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  machine.running = nullptr;
}

#if defined(__SANITIZE_ADDRESS__)
const void* main_stack;
size_t main_stack_bytes;
#endif

void to_main(bool for_good) {
  Fiber& fiber = *machine.running;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, main_stack, main_stack_bytes);
#else
  (void)for_good;
#endif
  switch_context(&fiber.context, machine.main_context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &main_stack, &main_stack_bytes);
#endif
}

void fiber_main() noexcept {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
#endif
  try {
    machine.grid->body();
  } catch (...) {
    machine.fault = std::current_exception();
  }
  machine.running->done = true;
  to_main(true);
  std::abort();
}

std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}
std::string text(const Fiber& fiber) {
  return "thread " + text(fiber.thread) + " of block " + text(fiber.block->index);
}
std::string text(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}
std::string whereabouts(const Fiber& fiber) {
  if (fiber.done) return text(fiber) + " has left the kernel";
  return text(fiber) + " waits at " + text(fiber.site);
}
[[noreturn]] void fail(const Fiber& fiber, const std::string& what) {
  throw Fault(what + " [" + machine.grid->kernel + ", " + text(fiber) + "]");
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && strcmp(a.file_name(), b.file_name()) == 0;
}

void wake(Fiber& fiber) {
  fiber.wait = Wait::kNone;
  machine.runnable.push_back(&fiber);
}

char* take_stack() {
  char* stack;
  if (machine.free_stacks.empty()) {
    stack = static_cast<char*>(aligned_alloc(64, kStackBytes));
  } else {
    stack = machine.free_stacks.back();
    machine.free_stacks.pop_back();
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);  // frames of a fiber that ended leave their borders there
#endif
  return stack;
}

void start_block(dim3 index) {
  auto block = std::make_unique<Block>();
  block->grid = machine.grid;
  block->index = index;
  if (machine.grid->dynamic_bytes) {
    block->dynamic.reset(new std::byte[machine.grid->dynamic_bytes]);
    memset(block->dynamic.get(), 0xff, machine.grid->dynamic_bytes);
  }
  const dim3 size = machine.grid->block_dim;
  block->fibers.resize(size.x * size.y * size.z);
  int number = 0;
  for (unsigned z = 0; z < size.z; ++z)
    for (unsigned y = 0; y < size.y; ++y)
      for (unsigned x = 0; x < size.x; ++x) {
        Fiber& fiber = block->fibers[number];
        fiber.block = block.get();
        fiber.thread = {x, y, z};
        fiber.number = number++;
        fiber.stack = take_stack();
        prepare(fiber);
      }
  for (auto fiber = block->fibers.rbegin(); fiber != block->fibers.rend(); ++fiber) wake(*fiber);
  machine.resident.push_back(std::move(block));
}

void end_fiber(Fiber& fiber) {
  if (fiber.stack) machine.free_stacks.push_back(std::exchange(fiber.stack, nullptr));
  release_context(fiber);
}

void try_block_barrier(Block& block) {
  if (block.waiting + block.done < int(block.fibers.size())) return;
  const Fiber* first = nullptr;
  for (Fiber& fiber : block.fibers) {
    if (fiber.wait != Wait::kBlock) continue;
    if (first == nullptr) first = &fiber;
    if (!same(fiber.site, first->site))
      fail(fiber, "divergent barrier: " + whereabouts(fiber) + ", " + whereabouts(*first));
  }
  for (const Fiber& fiber : block.fibers)
    if (fiber.done) fail(*first, "divergent barrier: " + whereabouts(*first) + ", " + whereabouts(fiber));
  block.last_votes = std::exchange(block.votes, 0);
  block.waiting = 0;
  for (Fiber& fiber : block.fibers) wake(fiber);
}

Fiber* peer(const Fiber& fiber, int lane) {
  const size_t number = size_t(fiber.number / kWarpSize * kWarpSize + lane);
  return number < fiber.block->fibers.size() ? &fiber.block->fibers[number] : nullptr;
}

bool joined(const Fiber& fiber, const Fiber& other) {
  return other.wait == Wait::kWarp && other.mask == fiber.mask && same(other.site, fiber.site);
}

void try_exchange(const Fiber& fiber) {
  const uint32_t mask = fiber.mask;
  Exchange all{};
  for (int i = 0; i < kWarpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    const Fiber* other = peer(fiber, i);
    if (other == nullptr)
      fail(fiber, "shuffle with an inactive lane: lane " + std::to_string(i) + " does not exist");
    if (other->done) fail(fiber, "shuffle with an inactive lane: " + whereabouts(*other));
    if (!joined(fiber, *other)) return;
    all.value[i] = other->value;
  }
  for (int i = 0; i < kWarpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    Fiber* other = peer(fiber, i);
    other->received = all;
    wake(*other);
  }
}

void try_grid_barrier() {
  for (const auto& block : machine.resident)
    for (const Fiber& fiber : block->fibers)
      if (fiber.wait != Wait::kGrid) return;
  for (const auto& block : machine.resident)
    for (Fiber& fiber : block->fibers) wake(fiber);
}

[[noreturn]] void explain_deadlock() {
  for (const auto& block : machine.resident)
    for (const Fiber& fiber : block->fibers) {
      if (fiber.wait != Wait::kWarp) continue;
      for (int i = 0; i < kWarpSize; ++i) {
        const Fiber* other = peer(fiber, i);
        if ((fiber.mask >> i & 1) && !joined(fiber, *other))
          fail(fiber, "shuffle with an inactive lane: " + whereabouts(fiber) + ", " + whereabouts(*other));
      }
    }
  for (const auto& block : machine.resident)
    for (const Fiber& fiber : block->fibers)
      for (const auto& other_block : machine.resident)
        for (const Fiber& other : other_block->fibers)
          if (!fiber.done && (other.done || other.wait != fiber.wait))
            fail(fiber, "a barrier that never completes: " + whereabouts(fiber) + ", " + whereabouts(other));
  throw Fault("a barrier that never completes [" + machine.grid->kernel + "]");
}

void step() {
  size_t at = machine.runnable.size() - 1;
  if (settings().seed) at = machine.random() % machine.runnable.size();
  std::swap(machine.runnable[at], machine.runnable.back());
  Fiber& fiber = *machine.runnable.back();
  machine.runnable.pop_back();
  to_fiber(fiber);
  if (machine.fault) std::rethrow_exception(std::exchange(machine.fault, nullptr));
  if (fiber.done) {
    end_fiber(fiber);
    ++fiber.block->done;
    if (fiber.block->waiting) try_block_barrier(*fiber.block);
  } else if (fiber.wait == Wait::kBlock) {
    try_block_barrier(*fiber.block);
  } else if (fiber.wait == Wait::kWarp) {
    try_exchange(fiber);
  } else if (fiber.wait == Wait::kGrid) {
    try_grid_barrier();
  }
}

void finish_blocks() {
  std::erase_if(machine.resident, [](const auto& block) { return block->done == int(block->fibers.size()); });
}

void abandon() {
  machine.runnable.clear();
  for (const auto& block : machine.resident)
    for (Fiber& fiber : block->fibers) end_fiber(fiber);
  machine.resident.clear();
}

void suspend() { to_main(false); }

}  // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

Fiber* current() { return machine.running; }

int block_barrier(Site site, int vote) {
  Fiber& fiber = *current();
  fiber.site = site;
  fiber.wait = Wait::kBlock;
  fiber.block->votes += vote;
  ++fiber.block->waiting;
  suspend();
  return fiber.block->last_votes;
}

void grid_barrier(Site site) {
  Fiber& fiber = *current();
  if (!machine.cooperative) fail(fiber, "a grid barrier in a launch that is not cooperative");
  fiber.site = site;
  fiber.wait = Wait::kGrid;
  suspend();
}

Exchange exchange(Site site, uint32_t mask, uint64_t value) {
  Fiber& fiber = *current();
  if (!(mask >> lane() & 1)) fail(fiber, "a shuffle at " + text(site) + " whose mask leaves out the caller");
  fiber.site = site;
  fiber.wait = Wait::kWarp;
  fiber.mask = mask;
  fiber.value = value;
  suspend();
  return fiber.received;
}

void check_active(Site site, uint32_t mask, int source) {
  if (source < 0 || source >= kWarpSize || !(mask >> source & 1))
    fail(*current(),
         "a shuffle at " + text(site) + " that reads an inactive lane, " + std::to_string(source));
}

void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes)
    fail(*current(), "misaligned access of " + std::to_string(bytes) + " bytes");
}

void* shared_bytes(const void* site, size_t bytes, size_t alignment) {
  Block& block = *current()->block;
  const size_t before = alignment % 16;
  for (const SharedObject& one : block.shared)
    if (one.site == site) return one.bytes.get() + before;
  block.shared.push_back({site, std::unique_ptr<std::byte[]>(new std::byte[before + bytes])});
  memset(block.shared.back().bytes.get(), 0xff, before + bytes);
  return block.shared.back().bytes.get() + before;
}

void* dynamic_shared() { return current()->block->dynamic.get(); }

std::string kernel_name(const void* function) {
  Dl_info info{};
  if (dladdr(function, &info) == 0 || info.dli_sname == nullptr) return "kernel";
  int status = 0;
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? readable : info.dli_sname;
  free(readable);
  const size_t end = name.find('(');
  return name.substr(0, end);
}

void run(Grid& grid, bool cooperative) {
  machine.grid = &grid;
  machine.cooperative = cooperative;
  machine.random.seed(settings().seed);
  const dim3 size = grid.grid_dim;
  std::vector<unsigned> order(size_t{size.x} * size.y * size.z);
  std::iota(order.begin(), order.end(), 0u);
  if (settings().seed) std::shuffle(order.begin(), order.end(), machine.random);
  const size_t most = cooperative ? order.size() : size_t(settings().resident_blocks);
  size_t next = 0;
  try {
    while (next < order.size() || !machine.resident.empty()) {
      for (; machine.resident.size() < most && next < order.size(); ++next) {
        const unsigned i = order[next];
        start_block({i % size.x, i / size.x % size.y, i / size.x / size.y});
      }
      if (machine.runnable.empty()) explain_deadlock();
      step();
      finish_blocks();
    }
  } catch (...) {
    abandon();
    throw;
  }
}

}  // namespace emulator
