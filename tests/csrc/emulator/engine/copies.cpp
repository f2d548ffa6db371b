// The copy engine (TMA), and the copies that threads start by themselves (cp.async).
#include <cstring>

#include "engine.h"
#include "instructions.h"
#include "tensor_maps.h"

namespace emulator {

void CopyGroups::end(size_t group) {
  --left[group];
  if (!waiting.threads.empty() && is_done(target)) wake(waiting);
}

bool CopyGroups::is_done(size_t groups) const {
  for (size_t i = 0; i < groups; ++i) {
    if (left[i] != 0) return false;
  }
  return true;
}

void CopyGroups::wait(int pending, const char* what) {
  target = open() > size_t(pending) ? open() - size_t(pending) : 0;
  if (!is_done(target)) wait_in(waiting, {what, pending});
}

namespace {

uint32_t place(const TensorMap& map, uint32_t address) { return map.swizzled ? swizzle_128(address) : address; }

struct Load : Event {
  Block* block;
  uint32_t barrier, to;
  TensorMap map;
  Position position;

  bool is_needed() const override { return !block->barrier(barrier).waiting.threads.empty(); }

  void happen() override {
    alignas(16) char text[512];
    const uint32_t bytes = map.line_bytes();
    for (uint32_t line = 0; line < map.lines(); ++line) {
      const Line found = find_line(map, position, line);
      if (found.inside * map.element_bytes != bytes) std::memset(text, 0, bytes);
      if (found.inside > 0)
        std::memcpy(text + found.skipped * map.element_bytes, found.where, found.inside * map.element_bytes);
      const uint32_t start = to + line * bytes;
      for (uint32_t i = 0; i < bytes; i += 16) block->write_by_engine(place(map, start + i), text + i);
    }
    complete_bytes(*block, barrier, map.bytes());
  }
};

struct Store : Event {
  Thread* thread;
  size_t group;
  uint32_t from;
  TensorMap map;
  Position position;

  bool is_needed() const override { return thread->stores.is_needed(group); }

  void happen() override {
    alignas(16) char text[512];
    const uint32_t bytes = map.line_bytes();
    const Block& block = *thread->block;
    for (uint32_t line = 0; line < map.lines(); ++line) {
      const Line found = find_line(map, position, line);
      if (found.inside == 0) continue;
      const uint32_t start = from + line * bytes;
      for (uint32_t i = 0; i < bytes; i += 16)
        std::memcpy(text + i, block.memory.data() + (place(map, start + i) - block.base), 16);
      std::memcpy(found.where, text + found.skipped * map.element_bytes, found.inside * map.element_bytes);
    }
    thread->stores.end(group);
  }
};

struct Copies : Event {
  Thread* thread;
  size_t group;
  std::vector<SharedCopy> copies;

  bool is_needed() const override { return thread->copies.is_needed(group); }

  static void perform(const Thread& thread, const SharedCopy& copy) {
    static constexpr char zeros[16] = {};
    thread.block->write(thread, copy.to, copy.from == nullptr ? zeros : copy.from, 16);
  }

  void happen() override {
    for (const SharedCopy& copy : copies) perform(*thread, copy);
    thread->copies.end(group);
  }
};

void check_box(const TensorMap& map, uint32_t address, const char* what) {
  self().block->at(address, map.bytes(), 128, what);
}

Position position_of(int rank, const int* at, const int* offsets) {
  Position position{};
  std::copy(at, at + rank, position.at);
  if (offsets != nullptr) std::copy(offsets, offsets + rank - 2, position.offsets);
  return position;
}

}  // namespace

void prefetch_map(const CUtensorMap* map) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("a tensor map at an address that 64 does not divide");
}

void load_box(const CUtensorMap* map, uint32_t barrier, uint32_t to, int rank, const int* at, const int* offsets) {
  auto load = std::make_unique<Load>();
  load->block = self().block, load->barrier = barrier, load->to = to;
  load->map = read_map(map, offsets != nullptr, rank), load->position = position_of(rank, at, offsets);
  check_box(load->map, to, "a load of the copy engine");
  check_front();
  for (uint32_t i = 0; i < load->map.bytes(); i += 16)
    self().block->check_visible(place(load->map, to + i), "a load of the copy engine");
  if (!self().block->barrier(barrier).fenced) fail("a load with a barrier that no barrier_init_fence has made known");
  schedule(machine->copies, std::move(load));
}

// What ordinary stores wrote must be visible to the copy engine by now; it reads when it likes.
void store_box(const CUtensorMap* map, uint32_t from, int rank, const int* at) {
  auto store = std::make_unique<Store>();
  Thread& thread = self();
  store->thread = &thread, store->group = thread.stores.open(), store->from = from;
  store->map = read_map(map, false, rank), store->position = position_of(rank, at, nullptr);
  check_box(store->map, from, "a store of the copy engine");
  check_front();
  for (uint32_t i = 0; i < store->map.bytes(); i += 16) {
    thread.block->check_visible(place(store->map, from + i), "a store of the copy engine");
  }
  thread.stores.begin();
  schedule(machine->stores, std::move(store));
}

void store_commit() { self().stores.commit(); }

// The emulator writes as soon as it has read, so that both waits are one.
void store_wait(int pending, bool) { self().stores.wait(pending, "all but %lld groups of its stores"); }

void copy_16(uint32_t to, const void* from, bool is_there) {
  Thread& thread = self();
  thread.block->at(to, 16, 16, "cp.async");
  check_front();
  if (is_there && reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("cp.async from a global address that 16 does not divide");
  const SharedCopy copy{to, is_there ? from : nullptr};
  const bool at_once = machine->copies == Timing::early || (machine->copies == Timing::mixed && machine->random() % 2);
  if (at_once)
    Copies::perform(thread, copy);
  else
    thread.open_copies.push_back(copy);
}

void copy_commit() {
  Thread& thread = self();
  const size_t group = thread.copies.open();
  if (!thread.open_copies.empty()) {
    auto copies = std::make_unique<Copies>();
    copies->thread = &thread, copies->group = group, copies->copies = std::move(thread.open_copies);
    thread.open_copies.clear();
    thread.copies.begin();
    schedule(machine->copies, std::move(copies));
  }
  thread.copies.commit();
}

void copy_wait(int pending) { self().copies.wait(pending, "all but %lld groups of its copies"); }

}  // namespace emulator
