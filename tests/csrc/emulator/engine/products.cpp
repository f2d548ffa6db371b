// Warpgroup products. They read shared memory and write registers at a moment of their own, each warp's rows at another: until
// then the thread's array holds NaN, and what anybody writes there is lost.
#include "products.h"

#include <cmath>
#include <limits>

#include "engine.h"
#include "instructions.h"

namespace emulator {
namespace {

int row_of(int lane, int i) { return lane / 4 + 8 * (i % 4 / 2); }
int column_of(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

WarpProducts& products_of(Warp& warp) {
  if (!warp.products) {
    if (warp.block->threads.size() % 128 != 0) fail("warpgroup instructions in a block that is not made of warpgroups");
    warp.products = std::make_shared<WarpProducts>();
    auto& first = warp.block->warps[warp.number / 4 * 4];
    warp.products->warpgroup = &first == &warp ? std::make_shared<Warpgroup>() : products_of(first).warpgroup;
  }
  return *warp.products;
}

// The lanes of a warp come to the same arrays in the same order, each in its own time.
int slot_of(WarpProducts& products, int lane, float* d, int n) {
  const auto& all = products.accumulators;
  size_t i = 0;
  while (i < all.size() && all[i]->d[lane] != d) ++i;
  if (i == all.size()) {
    i = 0;
    while (i < all.size() && all[i]->d[lane] != nullptr) ++i;
  }
  if (i == all.size()) {
    products.accumulators.push_back(std::make_unique<Accumulator>());
    products.accumulators.back()->n = n;
  }
  Accumulator& found = *products.accumulators[i];
  if (found.n != n) fail("products of widths %d and %d in the same registers", found.n, n);
  found.d[lane] = d;
  return int(i);
}

struct GroupOfProducts : Event {
  Warp* warp;

  bool is_needed() const override { return !warp->waiting_products.threads.empty(); }

  // The oldest: a warp's groups end in order.
  void happen() override {
    WarpProducts& all = *warp->products;
    for (const Product& product : all.groups[all.done].products) {
      Accumulator& to = *all.accumulators[product.slot];
      if (!product.accumulate) {
        for (auto& row : to.values) std::fill(row, row + product.n, 0.f);
      }
      compute(*warp->block, product, warp->number % 4 * PRODUCT_ROWS, to.values);
      for (int lane = 0; lane < 32; ++lane) {
        if (--to.pending[lane] > 0) continue;
        for (int i = 0; i < to.n / 2; ++i) to.d[lane][i] = to.values[row_of(lane, i)][column_of(lane, i)];
      }
    }
    ++all.done;
    wake(warp->waiting_products);
  }
};

}  // namespace

void product_fence() { self().products.fenced = true; }

void product(bool is_half, bool a_mn, bool b_mn, float* d, int n, uint64_t a, uint64_t b, bool accumulate) {
  Thread& thread = self();
  WarpProducts& all = products_of(*thread.warp);
  const int slot = slot_of(all, thread.lane, d, n);
  Accumulator& to = *all.accumulators[slot];
  if (to.pending[thread.lane]++ == 0) {
    if (!thread.products.fenced) fail("a product without wgmma::fence between its registers' last use and it");
    for (int i = 0; i < n / 2; ++i) {
      if (accumulate) to.values[row_of(thread.lane, i)][column_of(thread.lane, i)] = d[i];
      d[i] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  thread.products.open.push_back({a, b, is_half, a_mn, b_mn, accumulate, n, slot});
}

void product_commit() {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  WarpProducts& all = products_of(warp);
  const size_t number = thread.products.committed++;
  if (all.groups.size() == number) all.groups.push_back({thread.products.open});
  ProductGroup& group = all.groups[number];
  if (!(group.products == thread.products.open)) fail("its products are not those of the other lanes of its warp");
  thread.products.open.clear();
  if (++group.come < 32) return;

  std::vector<ProductGroup>& of_all = all.warpgroup->groups;
  if (of_all.size() == number) of_all.push_back({group.products});
  if (!(of_all[number].products == group.products)) fail("its products are not those of the other warps of its warpgroup");
  if (++of_all[number].come < 4) return;
  for (int i = 0; i < 4; ++i) {
    auto event = std::make_unique<GroupOfProducts>();
    event->warp = &warp.block->warps[warp.number / 4 * 4 + i];
    schedule(machine->products, std::move(event));
  }
}

void product_wait(int pending) {
  Thread& thread = self();
  const size_t target = thread.products.committed > size_t(pending) ? thread.products.committed - pending : 0;
  while (target > 0 && products_of(*thread.warp).done < target) {
    wait_in(thread.warp->waiting_products, {"all but %lld groups of its products", pending});
  }
  thread.products.fenced = false;
}

void check_no_product_is_left(const Thread& thread) {
  if (!thread.products.open.empty()) fail("ends with products that were never committed");
  if (thread.products.committed > 0 && thread.warp->products->done < thread.products.committed) {
    fail("ends while products still write its registers");
  }
}

}  // namespace emulator
