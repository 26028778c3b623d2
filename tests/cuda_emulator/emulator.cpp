#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace resnet_fused {
namespace emulator {

dim3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr int kLanes = 32;
constexpr size_t kStack = 128 * 1024;
constexpr size_t kMailbox = 64;  // bytes a lane can give

enum class State { ready, at_warp, at_block, done };

struct Copy {
  void* to;
  const void* from;
  bool wanted;
  bool ends_group;
};

struct Fiber {
  State state = State::ready;
  bool started = false;
  int exchanges = 0;
  jmp_buf jump;
  ucontext_t context;
  std::vector<Copy> copies;
  int groups = 0;  // ended, and not yet waited for
};

struct Emulator {
  std::vector<Fiber> fibers;
  std::vector<char*> stacks;
  std::vector<char> mailboxes;  // [2][warp][lane][kMailbox]
  const std::function<void()>* kernel = nullptr;
  char* shared = nullptr;
  jmp_buf scheduler;
  int current = 0;
  int threads = 0;
  int order = 0;
  bool late = false;
  std::mt19937 random{1};
  std::string error;
  int64_t launches = 0;
  size_t largest_shared = 0;
} e;

std::recursive_mutex one_at_a_time;

Fiber& me() { return e.fibers[e.current]; }

void fail(const std::string& message) {
  if (e.error.empty()) e.error = message;
}

void give_way(State state) {
  Fiber& fiber = me();
  fiber.state = state;
  if (_setjmp(fiber.jump) == 0) _longjmp(e.scheduler, 1);
}

void entry() {
  (*e.kernel)();
  if (!me().copies.empty() && e.late) copy_wait_for(0);
  me().state = State::done;
  _longjmp(e.scheduler, 1);
}

void resume(int thread) {
  e.current = thread;
  thread_index = dim3(thread);
  Fiber& fiber = e.fibers[thread];
  if (_setjmp(e.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = e.stacks[thread];
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
  setcontext(&fiber.context);
}

void permute(std::vector<int>& items) {
  if (e.order == 0) return;
  if (e.order == 1)
    std::reverse(items.begin(), items.end());
  else
    std::shuffle(items.begin(), items.end(), e.random);
}

std::vector<int> range(int first, int last) {
  std::vector<int> items;
  for (int i = first; i < last; ++i) items.push_back(i);
  return items;
}

// Runs a warp until every lane of it is at a block's barrier or done.
void run_warp(int warp) {
  std::vector<int> lanes = range(warp * kLanes, std::min((warp + 1) * kLanes, e.threads));
  permute(lanes);
  while (e.error.empty()) {
    for (const int lane : lanes)
      if (e.fibers[lane].state == State::ready) resume(lane);
    int at_warp = 0;
    for (const int lane : lanes) at_warp += e.fibers[lane].state == State::at_warp;
    if (at_warp == 0) return;
    if (at_warp != kLanes) return fail("a warp-wide instruction that not every lane of the warp reaches");
    for (const int lane : lanes) e.fibers[lane].state = State::ready;
  }
}

void run_block() {
  for (Fiber& fiber : e.fibers) {
    fiber.state = State::ready;
    fiber.started = false;
    fiber.exchanges = 0;
    fiber.groups = 0;
    fiber.copies.clear();
  }
  std::vector<int> warps = range(0, (e.threads + kLanes - 1) / kLanes);
  while (e.error.empty()) {
    permute(warps);
    for (const int warp : warps) run_warp(warp);
    int waiting = 0, done = 0;
    for (const Fiber& fiber : e.fibers) {
      waiting += fiber.state == State::at_block;
      done += fiber.state == State::done;
    }
    if (done == e.threads) return;
    if (waiting != e.threads) return fail("a barrier that not every thread of the block reaches");
    for (Fiber& fiber : e.fibers) fiber.state = State::ready;
  }
}

}  // namespace

void set_schedule(int order, bool late) {
  e.order = order;
  e.late = late;
  e.random.seed(static_cast<unsigned>(order));
}

int64_t launches() { return e.launches; }
int64_t largest_shared() { return static_cast<int64_t>(std::exchange(e.largest_shared, 0)); }

void allow_shared(size_t most, size_t asked) {
  if (asked > most) throw std::runtime_error("emulator: more shared memory than the kernel was allowed");
}

void run(dim3 grid, int threads, size_t shared, const std::function<void()>& kernel) {
  const std::lock_guard<std::recursive_mutex> lock(one_at_a_time);
  ++e.launches;
  e.largest_shared = std::max(e.largest_shared, shared);
  if (threads <= 0 || threads > 1024 || threads % kLanes != 0)
    throw std::runtime_error("emulator: block size");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("emulator: grid size");
  if (shared > 163 * 1024 || shared % 16 != 0) throw std::runtime_error("emulator: shared memory");
  while (e.stacks.size() < static_cast<size_t>(threads))
    e.stacks.push_back(static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  e.fibers.resize(threads);
  e.threads = threads;
  e.mailboxes.resize(2 * 1024 * kMailbox);
  e.kernel = &kernel;
  e.error.clear();
  block_size = dim3(threads);
  grid_size = grid;

  // Up against a page that faults.
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t pages = (shared + page - 1) / page * page;
  char* const map = static_cast<char*>(
      mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(map + pages, page, PROT_NONE);
  e.shared = map + pages - shared;
  std::vector<int> blocks = range(0, static_cast<int>(grid.x * grid.y * grid.z));
  permute(blocks);
  for (const int block : blocks) {
    block_index = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    memset(e.shared, 0xff, shared);
    run_block();
    if (!e.error.empty()) break;
  }
  munmap(map, pages + page);
  if (!e.error.empty()) throw std::runtime_error("emulator: " + e.error);
}

char* shared_memory() { return e.shared; }
void barrier() { give_way(State::at_block); }

const char* exchange(const void* mine, size_t bytes) {
  // Two boxes in turn: a lane that is ahead can be at the next instruction, never at the one after it.
  Fiber& fiber = me();
  char* const box =
      e.mailboxes.data() + ((fiber.exchanges++ & 1) * 1024 + (e.current / kLanes) * kLanes) * kMailbox;
  memcpy(box + (e.current % kLanes) * bytes, mine, bytes);
  give_way(State::at_warp);
  return box;
}

namespace {
void do_copy(const Copy& copy) {
  if (copy.wanted)
    memcpy(copy.to, copy.from, 16);
  else
    memset(copy.to, 0, 16);
}
}  // namespace

void copy_async(void* to, const void* from, bool wanted) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (wanted && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    fail("a copy from or to an address that is not a multiple of 16");
  const Copy copy{to, from, wanted, false};
  if (e.late)
    me().copies.push_back(copy);
  else
    do_copy(copy);
}

void copy_commit() {
  if (!e.late) return;
  me().copies.push_back({nullptr, nullptr, false, true});
  ++me().groups;
}

void copy_wait_for(int groups) {
  Fiber& fiber = me();
  size_t i = 0;
  while (fiber.groups > groups) {
    for (; !fiber.copies[i].ends_group; ++i) do_copy(fiber.copies[i]);
    ++i;
    --fiber.groups;
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<ptrdiff_t>(i));
}

namespace {
void ldmatrix_any(uint32_t* r, const void* at, bool transposed) {
  const char* rows[kLanes];
  memcpy(rows, exchange(&at, sizeof at), sizeof rows);
  const int lane = e.current % kLanes;
  for (int i = 0; i < 4; ++i) {
    if (!transposed) {
      memcpy(&r[i], rows[8 * i + lane / 4] + (lane % 4) * 4, 4);
    } else {
      uint16_t half[2];
      for (int j = 0; j < 2; ++j) memcpy(&half[j], rows[8 * i + (lane % 4) * 2 + j] + (lane / 4) * 2, 2);
      r[i] = half[0] | uint32_t{half[1]} << 16;
    }
  }
}

struct Operands {
  uint32_t a[4], b[2];
};
}  // namespace

void ldmatrix(uint32_t* r, const void* at) { ldmatrix_any(r, at, false); }
void ldmatrix_transposed(uint32_t* r, const void* at) { ldmatrix_any(r, at, true); }

// PTX ISA, "Matrix Fragments for mma.m16n8k16": a0 (row g, k 2t..), a1 (row g+8), a2 (row g, k 2t+8..), a3;
// b0 (k 2t.., column g), b1 (k 2t+8..); c0, c1 (row g, columns 2t..), c2, c3 (row g+8); g = lane / 4, t =
// lane % 4.
void mma_16bit(float* d, const uint32_t* a, const uint32_t* b, bool is_bfloat16) {
  Operands mine;
  memcpy(mine.a, a, sizeof mine.a);
  memcpy(mine.b, b, sizeof mine.b);
  Operands all[kLanes];
  memcpy(all, exchange(&mine, sizeof mine), sizeof all);
  const int lane = e.current % kLanes;
  const auto element = [&](uint32_t word, int i) {
    const uint16_t bits = static_cast<uint16_t>(word >> (16 * i));
    return is_bfloat16 ? bits_to_float(uint32_t{bits} << 16) : half_to_float(bits);
  };
  for (int i = 0; i < 4; ++i) {
    const int g_row = lane / 4, row_half = i / 2, column = (lane % 4) * 2 + i % 2;
    float sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, high = k / 8;
      sum += element(all[g_row * 4 + t].a[row_half + 2 * high], k % 2) *
             element(all[column * 4 + t].b[high], k % 2);
    }
    d[i] = sum;
  }
}

// "Matrix Fragments for mma.m16n8k8" with .tf32: a0 (row g, k t), a1 (row g+8), a2 (row g, k t+4), a3; b0 (k
// t, column g), b1 (k t+4). The unit ignores the low 13 bits.
void mma_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  Operands mine;
  memcpy(mine.a, a, sizeof mine.a);
  memcpy(mine.b, b, sizeof mine.b);
  Operands all[kLanes];
  memcpy(all, exchange(&mine, sizeof mine), sizeof all);
  const int lane = e.current % kLanes;
  for (int i = 0; i < 4; ++i) {
    const int g_row = lane / 4, row_half = i / 2, column = (lane % 4) * 2 + i % 2;
    float sum = d[i];
    for (int k = 0; k < 8; ++k)
      sum += bits_to_float(all[g_row * 4 + k % 4].a[row_half + 2 * (k / 4)] & ~0x1fffu) *
             bits_to_float(all[column * 4 + k % 4].b[k / 4] & ~0x1fffu);
    d[i] = sum;
  }
}

// To the nearest, ties away from zero (cvt.rna).
uint32_t round_tf32(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = (bits >> 10) & 31, mantissa = bits & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7fffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    return sign | static_cast<uint16_t>(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u);
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}

uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

}  // namespace emulator
}  // namespace resnet_fused
