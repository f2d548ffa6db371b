// Shared memory: what lies outside of a block's is refused, and who wrote it last is kept for the copy engine's sake.
#include <algorithm>
#include <cstring>

#include "engine.h"
#include "instructions.h"

namespace emulator {

char* Block::at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  if (address % alignment != 0) fail("%s at shared address %u, which %u does not divide", what, address, alignment);
  if (address < base || address + uint64_t{bytes} > base + memory.size()) {
    fail("%s of %u bytes at shared address %u, outside of the block's %u to %zu", what, bytes, address, base,
         base + memory.size());
  }
  return memory.data() + (address - base);
}

void Block::write(const Thread& thread, uint32_t address, const void* from, uint32_t bytes) {
  Granule& where = granule(address);
  if (where.barrier) fail("a store over a barrier at shared address %u", address);
  where.written = tick(), where.writer = thread.number;
  std::memcpy(memory.data() + (address - base), from, bytes);
}

void Block::write_by_engine(uint32_t address, const void* from) {
  Granule& where = granule(address);
  if (where.barrier) fail("a copy over a barrier at shared address %u", address);
  where.written = 0;
  std::memcpy(memory.data() + (address - base), from, 16);
}

void Block::check_visible(uint32_t address, const char* what) {
  const Granule& where = granule(address);
  if (where.written == 0 || where.written <= covered) return;
  const Thread& writer = threads[where.writer];
  if (where.written <= std::max(writer.fenced, writer.warp->covered)) return;
  fail("%s meets shared address %u, which thread %d wrote without fence_async behind it", what, address, where.writer);
}

uint32_t shared_memory() { return self().block->base; }

void load_shared(uint32_t address, void* to, uint32_t bytes) {
  std::memcpy(to, self().block->at(address, bytes, bytes, "a load"), bytes);
}

void store_shared(uint32_t address, const void* from, uint32_t bytes) {
  self().block->at(address, bytes, bytes, "a store");
  self().block->write(self(), address, from, bytes);
}

void load_cluster(uint32_t address, uint32_t rank, void* to, uint32_t bytes) {
  if (rank >= machine->blocks.size()) fail("the cluster has no block %u", rank);
  Block& block = machine->blocks[rank];
  if (std::all_of(block.threads.begin(), block.threads.end(), [](const Thread& thread) { return thread.ended; })) {
    fail("reads the shared memory of block %u of the cluster, which has ended", rank);
  }
  std::memcpy(to, block.at(address, bytes, bytes, "a load"), bytes);
}

static void check_global(const void* pointer, uint32_t bytes) {
  check_front();
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    fail("%u bytes at a global address that is %zu modulo them", bytes, size_t(reinterpret_cast<uintptr_t>(pointer) % bytes));
}

void load_global(const void* from, void* to, uint32_t bytes) {
  check_global(from, bytes);
  std::memcpy(to, from, bytes);
}

void store_global(void* to, const void* from, uint32_t bytes) {
  check_global(to, bytes);
  std::memcpy(to, from, bytes);
}

void wait_for_kernels_in_front() { self().waited = true; }

// The emulator runs launches one after the other: it only looks whether a kernel waits for those in front of it.
void check_front() {
  if (machine->dependent && !self().waited) fail("touches global memory while the kernel in front may still run");
}

uint32_t cluster_rank() { return self().block->rank; }

// A fence covers what the thread wrote, and what it knows of others: what they wrote before they last met. Where that was in a
// warp or at a barrier of the block it is taken to be known, although not all need have come to that barrier.
void fence_async() {
  Thread& thread = self();
  thread.fenced = tick();
  thread.warp->covered = std::max(thread.warp->covered, thread.warp_synced);
  thread.block->covered = std::max(thread.block->covered, thread.block_synced);
}

}  // namespace emulator
