// Fibers, the order in which they run, and the moments at which events happen.
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <new>

#include "engine.h"

namespace emulator {

Machine* machine = nullptr;
Settings settings;
Statistics statistics;

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::string where;
  if (machine != nullptr && machine->running != nullptr) {
    const Thread& thread = self();
    where = "block " + std::to_string(thread.block->index.x) + ", thread " + std::to_string(thread.number) + ": ";
  }
  throw Failure{where + text};
}

namespace {

constexpr size_t STACK = 128 * 1024, GUARD = 4096;

// Kept for the next launch. A thread that needs more than this runs into memory that nobody may touch.
char* stack(size_t i) {
  static std::vector<char*> stacks;
  while (stacks.size() <= i) {
    void* memory = mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE) != 0) fail("no memory for a thread's stack");
    stacks.push_back(static_cast<char*>(memory) + GUARD);
  }
  return stacks[i];
}

#ifdef __x86_64__
// Saves what a function must preserve on the stack, and goes on with another stack.
asm(R"(
.text
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
extern "C" void emulator_switch(void** save, void* load);

void* prepare(char* bottom, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(bottom + STACK);
  *--top = nullptr;  // where entry would return to, which it never does
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

void jump(void*& save, void* load) { emulator_switch(&save, load); }
#else
void* prepare(char* bottom, void (*entry)()) {
  auto* context = new (bottom) ucontext_t;  // the stack does not grow that far
  getcontext(context);
  context->uc_stack.ss_sp = bottom, context->uc_stack.ss_size = STACK, context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

void jump(void*& save, void* load) {
  static ucontext_t outside;
  if (save == nullptr) save = &outside;
  swapcontext(static_cast<ucontext_t*>(save), static_cast<ucontext_t*>(load));
}
#endif

void fiber() {
  try {
    (*machine->kernel)();
    const Thread& thread = self();
    if (!thread.stores.is_done(thread.stores.left.size())) fail("ends while the copy engine still reads what it stores");
    if (!thread.copies.is_done(thread.copies.left.size()) || !thread.open_copies.empty()) fail("ends while copies still come");
    check_no_product_is_left(thread);
  } catch (const Failure& failure) { machine->failure = std::make_unique<Failure>(failure); }
  self().ended = true;
  jump(self().stack_pointer, machine->stack_pointer);
}

void go_on(Thread* thread) {
  ++statistics.switches;
  machine->running = thread;
  jump(machine->stack_pointer, thread->stack_pointer);
  machine->running = nullptr;
  if (machine->failure) throw *machine->failure;
  if (thread->ended) {
    --machine->alive;
    cluster_lost_a_thread();
  }
}

std::string deadlock() {
  std::map<std::string, std::pair<int, std::string>> waits;
  for (const Block& block : machine->blocks) {
    for (const Thread& thread : block.threads) {
      if (thread.ended) continue;
      const Wait& wait = thread.wait;
      char what[200];
      snprintf(what, sizeof what, wait.what, static_cast<long long>(wait.first), static_cast<long long>(wait.second));
      auto& [count, first] = waits[wait.name == nullptr ? what : wait.name + std::string(what)];
      if (count++ == 0) first = "block " + std::to_string(block.index.x) + ", thread " + std::to_string(thread.number);
    }
  }
  std::string text = "deadlock:";
  for (const auto& [what, who] : waits) {
    text += " " + who.second;
    if (who.first > 1) text += " and " + std::to_string(who.first - 1) + " more";
    text += std::string(who.first > 1 ? " wait" : " waits") + " for " + what + ";";
    if (text.size() > 900) break;
  }
  text.pop_back();
  return text;
}

void happen(size_t i) {
  ++statistics.events;
  const std::unique_ptr<Event> event = std::move(machine->events[i]);
  machine->events[i] = std::move(machine->events.back());
  machine->events.pop_back();
  event->happen();
}

void let_due_events_happen() {
  machine->next_due = LATE;
  for (size_t i = 0; i < machine->events.size();) {
    const uint64_t due = machine->events[i]->due;
    if (due <= machine->now) {
      happen(i);
      i = 0;
      machine->next_due = LATE;
    } else {
      machine->next_due = std::min(machine->next_due, due);
      ++i;
    }
  }
}

void let_a_needed_event_happen() {
  std::vector<size_t> needed;
  for (size_t i = 0; i < machine->events.size(); ++i) {
    if (machine->events[i]->is_needed()) needed.push_back(i);
  }
  if (needed.empty()) throw Failure{deadlock()};
  happen(needed[machine->random() % needed.size()]);
}

// Half of the warps stand still for a while, unless no other can go on.
void change_pace() {
  constexpr uint64_t MOST = 4000;  // switches
  machine->next_pace = machine->now + machine->random() % MOST;
  for (Block& block : machine->blocks) {
    for (Warp& warp : block.warps) warp.slow = machine->random() % 2;
  }
  Queue all;
  all.threads.assign(machine->runnable.begin(), machine->runnable.end());
  all.threads.insert(all.threads.end(), machine->slow.begin(), machine->slow.end());
  machine->runnable.clear(), machine->slow.clear();
  wake(all);
}

Thread* take(std::deque<Thread*>& from) {
  if (machine->order == Order::first) {
    Thread* first = from.front();
    from.pop_front();
    return first;
  }
  if (machine->order != Order::last) std::swap(from[machine->random() % from.size()], from.back());
  Thread* last = from.back();
  from.pop_back();
  return last;
}

}  // namespace

void run_cluster() {
  size_t i = 0;
  for (Block& block : machine->blocks) {
    for (Thread& thread : block.threads) {
      thread.stack_pointer = prepare(stack(i++), fiber);
      machine->runnable.push_back(&thread);
    }
  }
  machine->alive = int(i);
  machine->next_due = LATE;
  while (machine->alive > 0) {
    if (machine->next_due <= ++machine->now) let_due_events_happen();
    if (machine->order == Order::uneven && machine->next_pace <= machine->now) change_pace();
    if (!machine->runnable.empty())
      go_on(take(machine->runnable));
    else if (!machine->slow.empty())
      go_on(take(machine->slow));
    else
      let_a_needed_event_happen();
  }
  if (!machine->events.empty()) throw Failure{"a block ended while the copy engine still wrote its shared memory"};
}

bool Queue::holds(const Thread* thread) const { return std::find(threads.begin(), threads.end(), thread) != threads.end(); }

void wait_in(Queue& queue, Wait wait) {
  Thread& thread = self();
  thread.wait = wait;
  queue.threads.push_back(&thread);
  jump(thread.stack_pointer, machine->stack_pointer);
}

void wake(Queue& queue) {
  for (Thread* thread : queue.threads) (thread->warp->slow ? machine->slow : machine->runnable).push_back(thread);
  queue.threads.clear();
}

void schedule(Timing timing, std::unique_ptr<Event> event) {
  constexpr uint64_t MOST = 300;  // switches
  const uint64_t draw = timing == Timing::mixed ? machine->random() % 3 : timing == Timing::early ? 0 : 1;
  if (draw == 0) {
    ++statistics.events;
    event->happen();
    return;
  }
  event->due = draw == 1 ? LATE : machine->now + machine->random() % MOST;
  machine->next_due = std::min(machine->next_due, event->due);
  machine->events.push_back(std::move(event));
}

}  // namespace emulator
