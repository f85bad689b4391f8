// Runs the CUDA solver's arithmetic (wavefront.h) on the CPU: the threads of a block one after the other between barriers.
//
// Reads cases from stdin, a line each:
//   batch groups size height width kh kw transposed mixed multiprocessors shared_limit seed bits
// and prints for each: form images pixels split threads held shared_weights largest_relative_error order_independent
// Shared memory is a heap block of the planned size, filled with NaN, so that the address sanitizer sees accesses outside
// it and a read before a write shows in the error. Each solve runs twice, its threads in opposite order: a difference means
// that a thread reads what another one writes between the same two barriers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "wavefront.h"

using namespace inv_conv::wave;

template <typename Body>
void each_thread(int threads, bool backwards, Body body) {
  for (int n = 0; n < threads; ++n) body(backwards ? threads - 1 - n : n);
}

template <typename T>
void fold(const Weights<T>& weights, int threads, bool backwards) {
  each_thread(threads, backwards, [&](int t) { weights.clear(t, threads); });
  each_thread(threads, backwards, [&](int t) { weights.identity(t, threads); });
  for (int m = 0; m + 1 < weights.s.size; ++m)
    each_thread(threads, backwards, [&](int t) { weights.eliminate(m, t, threads); });
  each_thread(threads, backwards, [&](int t) { weights.fold(t, threads); });
}

template <int Q, typename T, Form kForm, int P>
void run_block(Block<T, kForm, P> block, int blocks_a_group, int own, bool backwards) {
  const int threads = block.plan.threads, split = block.plan.split, lanes = threads / split;
  each_thread(threads, backwards, [&](int t) { block.clear(t, threads); });
  const int stride = blocks_a_group * block.plan.images;
  for (int first = own * block.plan.images; first < block.s.batch; first += stride) {
    block.first = first;
    block.count = std::min(block.plan.images, block.s.batch - first);
    if (kForm == kTile) each_thread(threads, backwards, [&](int t) { block.bring(t, threads); });
    if (kForm == kRing) each_thread(threads, backwards, [&](int t) { block.fetch(0, t, threads); });
    for (int d = 0; d < block.steps(); ++d) {
      const int turn = d % diagonals(block.s);
      if (kForm == kRing) each_thread(threads, backwards, [&](int t) { block.fetch(d + 1, t, threads); });
      for (int start = 0; start < block.items(); start += lanes)
        each_thread(lanes, backwards, [&](int lane) {
          if (start + lane >= block.items()) return;
          const auto item = block.item(start + lane);
          std::vector<Quad<T>> sums(size_t(split) * P, Quad<T>{});
          for (int share = 0; share < split; ++share) {
            Quad<T> sum[P] = {};
            Quad<T> held[4 * Q + 1] = {};
            if (Q > 0) block.template hold<Q>(item, block.first_tap(share), held);
            block.template add_taps<Q>(d, turn, item, block.first_tap(share), held, sum);
            for (int q = 0; q < P; ++q) sums[size_t(share) * P + q] = sum[q];
          }
          for (int apart = split / 2; apart > 0; apart /= 2) {
            const auto before = sums;
            for (int share = 0; share < split; ++share)
              for (int q = 0; q < P; ++q)
                for (int o = 0; o < 4; ++o) sums[size_t(share) * P + q].v[o] += before[size_t(share ^ apart) * P + q].v[o];
          }
          Quad<T> sum[P];
          for (int q = 0; q < P; ++q) sum[q] = sums[q];
          block.finish(d, turn, item, sum);
        });
    }
    if (kForm == kTile) each_thread(threads, backwards, [&](int t) { block.store(t, threads); });
  }
}

template <typename T>
std::vector<T> solve(const Shape& s, const Orders& orders, const Plan& plan, const std::vector<T>& y, const std::vector<T>& w,
                     bool backwards) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> x(y.size(), nan);
  const int blocks_a_group = std::max(1, (s.batch + plan.images - 1) / plan.images / 2);  // two rounds and more
  for (int group = 0; group < s.groups; ++group) {
    const T* own = w.data() + group * kernel_count(s);
    const int code = orders.of(group);
    for (int b = 0; b < blocks_a_group; ++b) {
      const size_t elements = plan.shared_bytes / sizeof(T);
      std::unique_ptr<T[]> shared(new T[elements]), global(new T[plan.shared_weights ? 0 : weight_count(s)]);
      std::fill_n(shared.get(), elements, nan);
      T* folded = plan.shared_weights ? shared.get() : global.get();
      T* state = shared.get() + (plan.shared_weights ? weight_count(s) : 0);
      fold(Weights<T>{s, code, own, folded}, plan.threads, backwards);
      auto run = [&](auto block) {
        switch (plan.held) {
          case 1: return run_block<1>(block, blocks_a_group, b, backwards);
          case 2: return run_block<2>(block, blocks_a_group, b, backwards);
          case 3: return run_block<3>(block, blocks_a_group, b, backwards);
          case 4: return run_block<4>(block, blocks_a_group, b, backwards);
          default: return run_block<0>(block, blocks_a_group, b, backwards);
        }
      };
      if (plan.form == kTile && plan.pixels == 1) run(Block<T, kTile, 1>{s, plan, group, code, y.data(), x.data(), folded, state, 0, 0});
      if (plan.form == kTile && plan.pixels == 2) run(Block<T, kTile, 2>{s, plan, group, code, y.data(), x.data(), folded, state, 0, 0});
      if (plan.form == kRing && plan.pixels == 1) run(Block<T, kRing, 1>{s, plan, group, code, y.data(), x.data(), folded, state, 0, 0});
      if (plan.form == kRing && plan.pixels == 2) run(Block<T, kRing, 2>{s, plan, group, code, y.data(), x.data(), folded, state, 0, 0});
      if (plan.form == kFlat && plan.pixels == 1) run(Block<T, kFlat, 1>{s, plan, group, code, y.data(), x.data(), folded, state, 0, 0});
      if (plan.form == kFlat && plan.pixels == 2) run(Block<T, kFlat, 2>{s, plan, group, code, y.data(), x.data(), folded, state, 0, 0});
    }
  }
  return x;
}

// A x (or A^T x) in float64, straight from the definition: A[o, p; i, q] is the kernel entry of the tap between p and q.
template <typename T>
std::vector<double> apply(const Shape& s, const Orders& orders, const std::vector<T>& x, const std::vector<T>& w) {
  std::vector<double> y(x.size(), 0.0);
  auto at = [&](int n, int g, int c, int h, int v) {
    return (((size_t(n) * s.groups + g) * s.size + c) * s.height + h) * s.width + v;
  };
  for (int g = 0; g < s.groups; ++g) {
    const int code = orders.of(g), down = code & 2 ? 1 : -1, right = code & 1 ? 1 : -1;
    for (int n = 0; n < s.batch; ++n)
      for (int o = 0; o < s.size; ++o)
        for (int i = 0; i < s.size; ++i)
          for (int a = 0; a < s.kh; ++a)
            for (int b = 0; b < s.kw; ++b) {
              const int row = code & 2 ? a : s.kh - 1 - a, column = code & 1 ? b : s.kw - 1 - b;
              double value = w[((size_t(g) * s.size + o) * s.size + i) * s.kh * s.kw + row * s.kw + column];
              if (a == 0 && b == 0) value = i == o ? 1 : i > o ? 0 : value;
              for (int h = 0; h < s.height; ++h)
                for (int v = 0; v < s.width; ++v) {
                  const int h2 = h + down * a, v2 = v + right * b;
                  if (h2 < 0 || h2 >= s.height || v2 < 0 || v2 >= s.width) continue;
                  if (s.transposed)
                    y[at(n, g, i, h2, v2)] += value * x[at(n, g, o, h, v)];
                  else
                    y[at(n, g, o, h, v)] += value * x[at(n, g, i, h2, v2)];
                }
            }
  }
  return y;
}

template <typename T>
void check(const Shape& s, const Orders& orders, int multiprocessors, size_t shared_limit, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<T> y(size_t(s.batch) * s.groups * s.size * s.plane()), w(size_t(s.groups) * kernel_count(s));
  for (T& value : y) value = T(normal(random));
  for (T& value : w) value = T(0.3 * normal(random) / std::sqrt(double(s.size) * s.kh * s.kw));
  const Plan plan = choose_plan(s, sizeof(T), multiprocessors, shared_limit);
  const std::vector<T> x = solve(s, orders, plan, y, w, false), again = solve(s, orders, plan, y, w, true);
  const std::vector<double> back = apply(s, orders, x, w);
  double error = 0, scale = 0;
  for (size_t n = 0; n < y.size(); ++n) {
    // not max(): a NaN must stay one
    const double apart = std::fabs(back[n] - double(y[n]));
    error = apart > error || std::isnan(apart) ? apart : error;
    if (std::isnan(apart)) break;
    scale = std::max(scale, std::fabs(double(y[n])));
  }
  const bool same = std::memcmp(x.data(), again.data(), x.size() * sizeof(T)) == 0;
  static const char* forms[] = {"tile", "ring", "flat"};
  std::printf("%s %d %d %d %d %d %d %.3e %d\n", forms[plan.form], plan.images, plan.pixels, plan.split, plan.threads, plan.held,
              int(plan.shared_weights), error / scale, int(same));
}

int main() {
  Shape s{};
  Orders orders{};
  int transposed, mixed, multiprocessors, bits;
  long shared_limit;
  unsigned seed;
  while (std::scanf("%d %d %d %d %d %d %d %d %d %d %ld %u %d", &s.batch, &s.groups, &s.size, &s.height, &s.width, &s.kh, &s.kw,
                    &transposed, &mixed, &multiprocessors, &shared_limit, &seed, &bits) == 13) {
    s.rows = std::min(s.kh, s.height);
    s.columns = std::min(s.kw, s.width);
    s.transposed = transposed;
    orders.count = mixed ? 4 : 1;
    for (uint32_t& codes : orders.codes) codes = mixed ? 0xe4e4e4e4u : seed % 4;
    if (bits == 64)
      check<double>(s, orders, multiprocessors, size_t(shared_limit), seed);
    else
      check<float>(s, orders, multiprocessors, size_t(shared_limit), seed);
  }
  return 0;
}
