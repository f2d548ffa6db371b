// Where threads wait for each other: barriers of a warp, of a block, of a cluster, and those that live in shared memory.
#include "engine.h"
#include "instructions.h"

namespace emulator {

void meet(const char* what, uint32_t mask, void* payload, void (*act)(Warp&, void* const (&payloads)[32])) {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  if ((mask >> thread.lane & 1) == 0) fail("%s without its own lane in the mask %08x", what, mask);
  if (warp.come == 0) warp.meeting = what, warp.mask = mask;
  if (warp.meeting != what || warp.mask != mask) {
    fail("is at %s, mask %08x, when other lanes are at %s, mask %08x", what, mask, warp.meeting, warp.mask);
  }
  warp.payloads[thread.lane] = payload;
  warp.come |= 1u << thread.lane;
  if (warp.come != mask) {
    wait_in(warp.waiting, {what});
  } else {
    if (act != nullptr) act(warp, warp.payloads);
    warp.come = 0;
    wake(warp.waiting);
  }
}

// Of what a warp does together this alone orders memory.
void sync_warp(uint32_t mask) {
  meet("__syncwarp", mask, nullptr, [](Warp& warp, void* const(&)[32]) {
    const uint64_t now = tick();
    for (Thread* lane : warp.lanes) {
      if (lane != nullptr && (warp.mask >> lane->lane & 1)) lane->warp_synced = now;
    }
  });
}

static void wait_at(NamedBarrier& barrier, int threads, Wait wait) {
  if (barrier.come == 0) barrier.threads = threads;
  if (barrier.threads != threads) fail("comes to a barrier of %d threads, where others wait for %d", threads, barrier.threads);
  if (++barrier.come < threads) {
    wait_in(barrier.waiting, wait);
  } else {
    barrier.come = 0;
    wake(barrier.waiting);
  }
  self().block_synced = tick();
}

void sync_block() {
  Block& block = *self().block;
  wait_at(block.named[0], int(block.threads.size()), {"__syncthreads"});
}

void named_barrier(int number, int threads) {
  if (number < 0 || number > 15) fail("there is no named barrier %d", number);
  if (threads <= 0 || threads % 32 != 0) fail("%d threads at named barrier %d are not whole warps", threads, number);
  wait_at(self().block->named[number], threads, {"named barrier %lld", number});
}

void sync_cluster() { wait_at(machine->cluster, machine->alive, {"the cluster's other threads"}); }

// Those that have ended are not waited for.
void cluster_lost_a_thread() {
  NamedBarrier& barrier = machine->cluster;
  if (barrier.come == 0) return;
  barrier.threads = machine->alive;
  if (barrier.come == barrier.threads) {
    barrier.come = 0;
    wake(barrier.waiting);
  }
}

Barrier& Block::barrier(uint32_t address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("there is no barrier at shared address %u", address);
  return found->second;
}

void barrier_init(uint32_t address, uint32_t arrivals) {
  Block& block = *self().block;
  block.at(address, 8, 8, "a barrier");
  if (arrivals < 1 || arrivals >= 1u << 20) fail("a barrier of %u arrivals", arrivals);
  Barrier barrier;
  barrier.count = barrier.pending = arrivals, barrier.initialiser = self().number;
  if (!block.barriers.emplace(address, barrier).second) fail("a barrier is initialised twice at shared address %u", address);
  block.granule(address).barrier = true;
}

void barrier_init_fence() {
  for (auto& [address, barrier] : self().block->barriers) barrier.fenced |= barrier.initialiser == self().number;
}

static void complete(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  wake(barrier.waiting);
}

void barrier_arrive(uint32_t address, uint32_t bytes) {
  Barrier& barrier = self().block->barrier(address);
  if (barrier.pending == 0) fail("arrives once too often at the barrier at shared address %u, of %u", address, barrier.count);
  barrier.bytes += bytes;
  if (barrier.bytes >= 1 << 20) fail("the barrier at shared address %u expects too many bytes", address);
  --barrier.pending;
  complete(barrier);
}

void complete_bytes(Block& block, uint32_t address, uint32_t bytes) {
  Barrier& barrier = block.barrier(address);
  barrier.bytes -= bytes;
  if (barrier.bytes < 0 && barrier.pending == 0) {
    fail("more bytes arrive at the barrier at shared address %u than were announced: %lld", address,
         -static_cast<long long>(barrier.bytes));
  }
  complete(barrier);
}

// A fresh barrier is in phase 0, as if a phase of parity 1 had been completed.
void barrier_wait(uint32_t address, uint32_t parity, const char* name, int iteration) {
  Thread& thread = self();
  if (parity > 1) fail("a parity of %u", parity);
  Barrier& barrier = thread.block->barrier(address);
  while (barrier.phase % 2 == parity) {
    wait_in(barrier.waiting, {", iteration %lld, barrier at shared address %lld", iteration, address, name});
  }
  thread.block_synced = tick();
}

void change_registers(int count, bool up) {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  if (count < 24 || count > 256 || count % 8 != 0) fail("%d registers a thread", count);
  meet(up ? "setmaxnreg.inc" : "setmaxnreg.dec", 0xFFFFFFFF, nullptr, nullptr);
  if (thread.lane != 0) {
    meet("setmaxnreg", 0xFFFFFFFF, nullptr, nullptr);
    return;
  }
  if (up ? count < warp.registers : count > warp.registers) fail("setmaxnreg from %d to %d registers", warp.registers, count);
  Block& block = *thread.block;
  while (block.free_registers + 32 * (warp.registers - count) < 0) {
    wait_in(block.registers_waiting, {"%lld registers in place of %lld", count, warp.registers});
  }
  block.free_registers += 32 * (warp.registers - count);
  warp.registers = count;
  wake(block.registers_waiting);
  meet("setmaxnreg", 0xFFFFFFFF, nullptr, nullptr);
}

}  // namespace emulator
