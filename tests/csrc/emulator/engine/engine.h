// What a launch on the emulated GPU is made of. A CUDA thread is a fiber; the blocks of a cluster run interleaved, clusters one
// after the other. What the hardware does by itself, at a time of its own, is an Event.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"
#include "products.h"
#include "settings.h"

namespace emulator {

struct Block;
struct Thread;
struct Warp;
struct Machine;

constexpr uint64_t LATE = ~uint64_t{0};

struct Failure {
  std::string text;
};

// Ends the launch; says which thread it is that runs, if one does.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// What a thread that cannot go on waits for: a format of two numbers, or the name that the kernel has for it.
struct Wait {
  const char* what = "";
  int64_t first = 0, second = 0;
  const char* name = nullptr;
};

struct Queue {
  std::vector<Thread*> threads;
  bool holds(const Thread* thread) const;
};

void wait_in(Queue& queue, Wait wait);  // the running thread, until it is woken
void wake(Queue& queue);

struct Event {
  uint64_t due = 0;
  virtual ~Event() = default;
  virtual bool is_needed() const = 0;  // a thread waits for it
  virtual void happen() = 0;
};

// Lets it happen at a moment of the seed's choice, at the latest when a thread waits for it and none can go on.
void schedule(Timing timing, std::unique_ptr<Event> event);

// A thread's groups of asynchronous copies.
struct CopyGroups {
  std::vector<int> left{0};  // copies on their way, by group; the last one is open
  Queue waiting;
  size_t target = 0;  // groups in front of it must be done

  size_t open() const { return left.size() - 1; }
  void begin() { ++left.back(); }
  void commit() { left.push_back(0); }
  void end(size_t group);
  bool is_done(size_t groups) const;
  void wait(int pending, const char* what);
  bool is_needed(size_t group) const { return !waiting.threads.empty() && group < target; }
};

struct SharedCopy {
  uint32_t to;
  const void* from;  // null: zeros
};

// Of the tensor cores' work what a thread knows.
struct LaneProducts {
  std::vector<Product> open;
  size_t committed = 0, target = 0;
  bool fenced = false;
};

struct Thread {
  void* stack_pointer = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int number = 0, lane = 0;
  uint3 index{};
  bool ended = false, waited = false;  // for the kernels in front
  Wait wait;
  CopyGroups stores, copies;
  std::vector<SharedCopy> open_copies;
  LaneProducts products;
  uint64_t fenced = 0, warp_synced = 0, block_synced = 0;  // when last
};

struct Warp {
  Block* block = nullptr;
  int number = 0, registers = 0;
  bool slow = false;
  Thread* lanes[32] = {};
  // Lanes that have come to an instruction that all carry out together.
  const char* meeting = nullptr;
  uint32_t mask = 0, come = 0;
  void* payloads[32] = {};
  Queue waiting, waiting_products;
  uint64_t covered = 0;  // what its lanes wrote before that is visible to the copy engine
  std::shared_ptr<WarpProducts> products;
};

struct Barrier {
  uint32_t count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // announced and not arrived
  int initialiser = 0;
  bool fenced = false;
  Queue waiting;
};

struct NamedBarrier {
  int threads = 0, come = 0;
  Queue waiting;
};

// 16 bytes of shared memory.
struct Granule {
  uint64_t written = 0;  // by an ordinary store; 0: by the copy engine, or never
  int writer = 0;
  bool barrier = false;
};

struct Block {
  uint3 index{};
  uint32_t rank = 0;  // in its cluster
  std::deque<Thread> threads;
  std::deque<Warp> warps;
  uint32_t base = 0;
  std::vector<char> memory;
  std::vector<Granule> granules;
  std::unordered_map<uint32_t, Barrier> barriers;
  NamedBarrier named[16];
  int free_registers = 0;
  Queue registers_waiting;
  uint64_t covered = 0;

  char* at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what);
  Granule& granule(uint32_t address) { return granules[(address - base / 16 * 16) / 16]; }
  void write(const Thread& thread, uint32_t address, const void* from, uint32_t bytes);
  void write_by_engine(uint32_t address, const void* from);  // 16 bytes
  void check_visible(uint32_t address, const char* what);    // 16 bytes, to the copy engine
  Barrier& barrier(uint32_t address);
};

// Which of the threads that can go on does: who came first or last, any, or any of the warps that are not slow at the moment.
enum class Order { first, last, any, uneven };

struct Machine {
  Thread* running = nullptr;
  void* stack_pointer = nullptr;
  std::deque<Block> blocks;
  std::deque<Thread*> runnable, slow;
  uint64_t next_pace = 0;  // when other warps become slow
  std::vector<std::unique_ptr<Event>> events;
  uint64_t now = 1, next_due = 0;
  int alive = 0;
  std::mt19937_64 random;
  Order order{};
  bool dependent = false;  // may start before the kernel in front has ended
  Timing copies{}, products{}, stores{};
  NamedBarrier cluster;
  std::unique_ptr<Failure> failure;
  const std::function<void()>* kernel = nullptr;
  dim3 grid, block_size;
};

extern Machine* machine;
inline Thread& self() { return *machine->running; }
inline uint64_t tick() { return ++machine->now; }

void run_cluster();                                             // fibers.cpp: every thread of the machine's blocks, to its end
void check_front();                                             // memory.cpp
void complete_bytes(Block&, uint32_t barrier, uint32_t bytes);  // barriers.cpp
void cluster_lost_a_thread();
void check_no_product_is_left(const Thread&);  // products.cpp

// Returns when every lane of `mask` has come; the last one's `act` is called with all lanes' payloads.
void meet(const char* what, uint32_t mask, void* payload, void (*act)(Warp&, void* const (&payloads)[32]));

}  // namespace emulator
