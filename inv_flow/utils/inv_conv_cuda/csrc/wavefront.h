// The CUDA solver's arithmetic: what one thread of a block does between two barriers. nvcc compiles it into the kernels of
// cuda_solver.cu; a C++ compiler compiles the same source with the threads of a block run one after the other, for tests.
//
// A block solves some images of one channel group. In order TL, with Li the inverse of the pinned tap and W'_t = Li W_t,
//     x[p] = Li y[p] - sum_t W'_t x[p - t]
// and the pixels of an anti-diagonal d = h + w are independent: height + width - 1 steps, one barrier each. An item is four
// outputs ("a quad") of up to P pixels of the anti-diagonal; `split` neighbouring threads share an item, each taking every
// split-th tap, and add their sums up in a fixed order, so that two runs are bit-equal.
//
// Where x lives while it is needed:
//   kTile  the images whole in shared memory, (image, h, w, channel). Holds Li y until x replaces it.
//   kRing  the last kh + kw - 1 anti-diagonals in shared memory, and y of two; x streams to global memory. For images whose
//          tile does not fit: rows advance together, each one pixel behind the row above it.
//   kFlat  global memory, when not even the ring fits.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define INV_CONV_BOTH __host__ __device__ __forceinline__
#define INV_CONV_UNROLL _Pragma("unroll")
#else
#define INV_CONV_BOTH inline
#define INV_CONV_UNROLL
#endif

// An asynchronous copy of one element from global to shared memory, complete at the wait before the next barrier.
#if defined(__CUDA_ARCH__)
#include <cuda_pipeline_primitives.h>
#define INV_CONV_COPY(to, from) __pipeline_memcpy_async((to), (from), sizeof(*(to)))
#define INV_CONV_COPY_WAIT() __pipeline_commit(), __pipeline_wait_prior(0)
#else
#define INV_CONV_COPY(to, from) (*(to) = *(from))
#define INV_CONV_COPY_WAIT() ((void)0)
#endif

namespace inv_conv {
namespace wave {

struct Shape {
  int batch, groups, size, height, width;
  int kh, kw;         // of the kernel as it is stored
  int rows, columns;  // of the kernel that can meet a pixel: min(kh, height), min(kw, width)
  bool transposed;

  INV_CONV_BOTH int taps() const { return rows * columns; }
  INV_CONV_BOTH int plane() const { return height * width; }
};

// The orders that the groups take in turn, two bits each (bit 0: mirrored in the width; bit 1: in the height).
constexpr int kMostOrders = 4096;
struct Orders {
  int count;
  uint32_t codes[kMostOrders / 16];

  INV_CONV_BOTH int of(int group) const {
    const int g = group % count;
    return int(codes[g / 16] >> (2 * (g % 16)) & 3);
  }
};

enum Form { kTile, kRing, kFlat };

struct Plan {
  Form form;
  int images;           // that a block solves at once
  int pixels;           // P: pixels that a thread solves at once, 1 or 2
  int split;            // threads that share an item; a power of two
  int threads;          // of a block
  int held;             // Q: quads of inputs whose weights a thread keeps in registers, of its first tap; 0: none
  bool shared_weights;  // else they are folded by a launch of their own, into global memory
  size_t shared_bytes;
};

INV_CONV_BOTH int quads(int size) { return (size + 3) / 4; }
INV_CONV_BOTH int padded(int size) { return 4 * quads(size); }
// Elements between two pixels: an odd number of 16-byte words, so that neighbours on an anti-diagonal lie in other banks.
INV_CONV_BOTH int pixel_stride(int size) { return 4 * (quads(size) | 1); }
// Quads of weights between two taps: an odd number, so that threads that share an item read from other banks.
INV_CONV_BOTH int tap_stride(int size) { return padded(size) | 1; }
INV_CONV_BOTH int diagonals(const Shape& s) { return s.rows + s.columns - 1; }
INV_CONV_BOTH int64_t weight_count(const Shape& s) { return int64_t(quads(s.size)) * s.taps() * tap_stride(s.size) * 4; }
// Elements of one group's kernel, as it is stored.
INV_CONV_BOTH int64_t kernel_count(const Shape& s) { return int64_t(s.size) * s.size * s.kh * s.kw; }
INV_CONV_BOTH int longest(const Shape& s) { return s.height < s.width ? s.height : s.width; }

// Elements of shared memory beside the weights.
inline int64_t state_count(const Shape& s, Form form, int images) {
  const int64_t stride = pixel_stride(s.size);
  if (form == kTile) return int64_t(images) * s.plane() * stride;
  if (form == kRing) return int64_t(images) * s.height * stride * (diagonals(s) + 2);
  return 0;
}

constexpr int most_held(size_t element) { return element == 4 ? 4 : 2; }

// The plan for a device with `multiprocessors`, and `shared_limit` bytes of shared memory for a block.
inline Plan choose_plan(const Shape& s, size_t element, int multiprocessors, size_t shared_limit) {
  constexpr int kThreads = 512;
  Plan plan{};
  const int64_t limit = int64_t(shared_limit / element), weights = weight_count(s);
  plan.shared_weights = weights + state_count(s, kRing, 1) <= limit || weights + state_count(s, kTile, 1) <= limit;
  const int64_t left = limit - (plan.shared_weights ? weights : 0);
  plan.form = state_count(s, kTile, 1) <= left ? kTile : state_count(s, kRing, 1) <= left ? kRing : kFlat;
  // more images than multiprocessors: some at once, while there are threads and memory for them
  const int64_t units = int64_t(s.batch) * s.groups;
  const int per_image = longest(s) * quads(s.size);
  plan.images = 1;
  while (int64_t(plan.images) * multiprocessors < units && plan.images < s.batch && (plan.images + 1) * per_image <= kThreads &&
         state_count(s, plan.form, plan.images + 1) <= left)
    ++plan.images;
  const int64_t items = int64_t(plan.images) * per_image;
  plan.pixels = items >= kThreads / 4 && quads(s.size) >= 6 ? 2 : 1;
  const int64_t shared_items = (items + plan.pixels - 1) / plan.pixels;
  plan.split = 1;
  while (plan.split < 8 && plan.split * 2 < s.taps() && shared_items * plan.split * 2 <= kThreads) plan.split *= 2;
  // as many registers as 512 threads have, when a thread has the same item on every anti-diagonal
  plan.held = plan.form != kFlat && plan.pixels == 1 && quads(s.size) <= most_held(element) && items * plan.split <= kThreads
                  ? quads(s.size)
                  : 0;
  const int64_t wanted = (shared_items * plan.split + 31) / 32 * 32;
  plan.threads = int(wanted < 128 ? 128 : wanted > kThreads ? kThreads : wanted);
  plan.shared_bytes = size_t((plan.shared_weights ? weights : 0) + state_count(s, plan.form, plan.images)) * element;
  return plan;
}

template <typename T>
struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) Quad {
  T v[4];
};

// Li and the folded taps of one group: (output quad, tap, input channel, 4 outputs). Tap 0 is Li, tap a * columns + b is
// -Li W_(a, b); transposed, Li^T and -Li^T W_(a, b)^T. Channels beyond `size` are 0.
template <typename T>
struct Weights {
  Shape s;
  int code;    // of the group
  const T* w;  // (size, size, kh, kw) of the group, in global memory
  T* folded;

  INV_CONV_BOTH int64_t at(int output, int tap, int input) const {
    return ((int64_t(output / 4) * s.taps() + tap) * tap_stride(s.size) + input) * 4 + output % 4;
  }
  // Entry (row, column) of tap (a, b) of the kernel, as it is stored.
  INV_CONV_BOTH T stored(int row, int column, int a, int b) const {
    const int h = code & 2 ? a : s.kh - 1 - a, v = code & 1 ? b : s.kw - 1 - b;
    return w[(int64_t(row) * s.size + column) * s.kh * s.kw + int64_t(h) * s.kw + v];
  }
  INV_CONV_BOTH T& inverse(int row, int column) const {
    return s.transposed ? folded[at(column, 0, row)] : folded[at(row, 0, column)];
  }

  INV_CONV_BOTH void clear(int thread, int threads) const {
    const int64_t count = weight_count(s);
    for (int64_t n = thread; n < count; n += threads) folded[n] = T(0);
  }
  INV_CONV_BOTH void identity(int thread, int threads) const {
    for (int n = thread; n < s.size; n += threads) folded[at(n, 0, n)] = T(1);
  }
  // Row m of Li is final: take it out of the rows below. For m = 0 ... size - 2, a barrier after each.
  INV_CONV_BOTH void eliminate(int m, int thread, int threads) const {
    const int below = s.size - 1 - m, count = below * (m + 1);
    for (int n = thread; n < count; n += threads) {
      const int row = m + 1 + n / (m + 1), column = n % (m + 1);
      inverse(row, column) -= stored(row, m, 0, 0) * inverse(m, column);
    }
  }
  // The other taps, four outputs at a time.
  INV_CONV_BOTH void fold(int thread, int threads) const {
    const int others = s.taps() - 1, inputs = s.size * others;
    const int count = inputs * quads(s.size);
    for (int n = thread; n < count; n += threads) {
      const int quad = n / inputs, input = n % inputs / others, tap = 1 + n % others;
      const int a = tap / s.columns, b = tap % s.columns;
      const Quad<T>* left = reinterpret_cast<const Quad<T>*>(folded + at(4 * quad, 0, 0));
      Quad<T> sum = {{T(0), T(0), T(0), T(0)}};
      const int begin = s.transposed ? 4 * quad : 0;
      const int end = s.transposed || 4 * quad + 4 > s.size ? s.size : 4 * quad + 4;
      for (int m = begin; m < end; ++m) {
        const T value = s.transposed ? stored(input, m, a, b) : stored(m, input, a, b);
        const Quad<T> l = left[m];
        INV_CONV_UNROLL
        for (int o = 0; o < 4; ++o) sum.v[o] -= l.v[o] * value;
      }
      *reinterpret_cast<Quad<T>*>(folded + at(4 * quad, tap, input)) = sum;
    }
  }
};

// One block's solve of `count` images from `first` on.
template <typename T, Form kForm, int P>
struct Block {
  Shape s;
  Plan plan;
  int group, code;
  const T* y;       // (batch, groups * size, height, width), in global memory
  T* x;             // as y
  const T* folded;  // see Weights
  T* state;         // shared memory: the tile, or the ring and then two anti-diagonals of y
  int first, count;

  // An item: a quad of outputs, and for each of P pixels its image and its row within an anti-diagonal. The same on every
  // anti-diagonal; some are empty on the shorter ones.
  struct Item {
    int quad;
    int image[P], row[P];
  };
  struct Tap {
    int a, b;
  };

  INV_CONV_BOTH int steps() const { return s.height + s.width - 1; }
  INV_CONV_BOTH int along() const { return (plan.images * longest(s) + P - 1) / P; }
  INV_CONV_BOTH int items() const { return along() * quads(s.size); }
  INV_CONV_BOTH Item item(int n) const {
    Item it;
    it.quad = n / along();
    INV_CONV_UNROLL
    for (int q = 0; q < P; ++q) {
      const int pixel = n % along() + q * along();
      it.image[q] = pixel / longest(s);
      it.row[q] = pixel % longest(s);
    }
    return it;
  }
  // The first tap of a thread's share. In kTile Li y is there already.
  INV_CONV_BOTH Tap first_tap(int share) const {
    const int tap = (kForm == kTile ? 1 : 0) + share;
    return Tap{tap / s.columns, tap % s.columns};
  }

  // Anti-diagonal d: rows [top, top + length) of every image.
  INV_CONV_BOTH int top(int d) const { return d >= s.width ? d - s.width + 1 : 0; }
  INV_CONV_BOTH int length(int d) const { return (d < s.height ? d : s.height - 1) - top(d) + 1; }
  INV_CONV_BOTH bool here(int d, const Item& it, int q) const { return it.image[q] < count && it.row[q] < length(d); }

  INV_CONV_BOTH int64_t planes(int image) const {
    return (int64_t(first + image) * s.groups + group) * s.size * s.plane();
  }
  // Position in a channel plane of TL pixel (h, w). A transposed solve runs against the order.
  INV_CONV_BOTH int place(int h, int w) const {
    const int runs = code ^ (s.transposed ? 3 : 0);
    return (runs & 2 ? s.height - 1 - h : h) * s.width + (runs & 1 ? s.width - 1 - w : w);
  }
  INV_CONV_BOTH T* tile(int image, int h, int w) const {
    return state + ((image * s.height + h) * s.width + w) * pixel_stride(s.size);
  }
  // `turn` is the number of the anti-diagonal modulo the length of the ring.
  INV_CONV_BOTH T* ring(int turn, int image, int h) const {
    return state + ((turn * plan.images + image) * s.height + h) * pixel_stride(s.size);
  }
  INV_CONV_BOTH T* source(int d, int image, int h) const { return ring(diagonals(s) + d % 2, image, h); }

  // Channels beyond `size` are read with weight 0, and must be finite: clear them, once.
  INV_CONV_BOTH void clear(int thread, int threads) const {
    const int rows = kForm == kTile ? s.plane() : kForm == kRing ? s.height * (diagonals(s) + 2) : 0;
    const int elements = plan.images * rows * pixel_stride(s.size);
    for (int n = thread; n < elements; n += threads) state[n] = T(0);
  }

  // kTile: put Li y of every pixel in the tile. Neighbouring threads read neighbouring pixels.
  INV_CONV_BOTH void bring(int thread, int threads) const {
    const int pixels = count * s.plane(), work = pixels * quads(s.size);
    for (int n = thread; n < work; n += threads) {
      const int quad = n / pixels, image = n % pixels / s.plane();
      const int pixel = n % pixels % s.plane(), h = pixel / s.width, w = pixel % s.width;
      const T* from = y + planes(image) + place(h, w);
      const Quad<T>* left = reinterpret_cast<const Quad<T>*>(folded) + int64_t(quad) * s.taps() * tap_stride(s.size);
      const int begin = s.transposed ? 4 * quad : 0;
      const int end = s.transposed || 4 * quad + 4 > s.size ? s.size : 4 * quad + 4;
      Quad<T> sum = {{T(0), T(0), T(0), T(0)}};
      for (int i = begin; i < end; ++i) {
        const T value = from[int64_t(i) * s.plane()];
        const Quad<T> l = left[i];
        INV_CONV_UNROLL
        for (int o = 0; o < 4; ++o) sum.v[o] += l.v[o] * value;
      }
      *reinterpret_cast<Quad<T>*>(tile(image, h, w) + 4 * quad) = sum;
    }
  }

  // kRing: start copying y of anti-diagonal d.
  INV_CONV_BOTH void fetch(int d, int thread, int threads) const {
    if (d >= steps()) return;
    const int pixels = count * length(d), work = pixels * s.size;
    for (int n = thread; n < work; n += threads) {
      const int channel = n / pixels, image = n % pixels / length(d), h = top(d) + n % pixels % length(d);
      INV_CONV_COPY(source(d, image, h) + channel, y + planes(image) + int64_t(channel) * s.plane() + place(h, d - h));
    }
  }

  INV_CONV_BOTH const Quad<T>* weights(const Item& it, Tap tap) const {
    const int64_t place = int64_t(it.quad) * s.taps() + tap.a * s.columns + tap.b;
    return reinterpret_cast<const Quad<T>*>(folded) + place * tap_stride(s.size);
  }
  // The weights of this thread's first tap: the same on every anti-diagonal.
  template <int Q>
  INV_CONV_BOTH void hold(const Item& it, Tap tap, Quad<T> (&held)[4 * Q + 1]) const {
    if (tap.a >= s.rows) return;
    const Quad<T>* from = weights(it, tap);
    INV_CONV_UNROLL
    for (int i = 0; i < 4 * Q; ++i) held[i] = from[i];
  }

  // This thread's part of the sums of an item: from its first tap, every split-th one. `turn` = d modulo the ring.
  template <int Q>
  INV_CONV_BOTH void add_taps(int d, int turn, const Item& it, Tap tap, const Quad<T> (&held)[4 * Q + 1], Quad<T> (&sum)[P]) const {
    bool first_one = true;
    while (tap.a < s.rows) {
      const T* from[P];
      bool any = false;
      INV_CONV_UNROLL
      for (int q = 0; q < P; ++q) {
        const int row = top(d) + it.row[q], h = row - tap.a, w = d - row - tap.b;
        from[q] = nullptr;
        if (!here(d, it, q) || h < 0 || w < 0) continue;
        any = true;
        const bool own = tap.a + tap.b == 0;
        if (kForm == kTile) from[q] = tile(it.image[q], h, w);
        if (kForm == kRing) {
          const int back = turn - tap.a - tap.b;
          from[q] = own ? source(d, it.image[q], h) : ring(back < 0 ? back + diagonals(s) : back, it.image[q], h);
        }
        if (kForm == kFlat) from[q] = (own ? y : x) + planes(it.image[q]) + place(h, w);
      }
      if (any) {
        if (Q > 0 && first_one)
          add_held<Q>(held, from, sum);
        else
          add_tap(weights(it, tap), from, sum);
      }
      first_one = false;
      for (tap.b += plan.split; tap.b >= s.columns; tap.b -= s.columns) ++tap.a;
    }
  }

  template <int Q>
  INV_CONV_BOTH void add_held(const Quad<T> (&held)[4 * Q + 1], const T* const (&from)[P], Quad<T> (&sum)[P]) const {
    INV_CONV_UNROLL
    for (int q = 0; q < P; ++q) {
      if (from[q] == nullptr) continue;
      INV_CONV_UNROLL
      for (int i = 0; i < Q; ++i) {
        const Quad<T> value = *reinterpret_cast<const Quad<T>*>(from[q] + 4 * i);
        INV_CONV_UNROLL
        for (int k = 0; k < 4; ++k) {
          INV_CONV_UNROLL
          for (int o = 0; o < 4; ++o) sum[q].v[o] += held[4 * i + k].v[o] * value.v[k];
        }
      }
    }
  }

  INV_CONV_BOTH void add_tap(const Quad<T>* weight, const T* const (&from)[P], Quad<T> (&sum)[P]) const {
    const int inputs = quads(s.size);
    for (int i = 0; i < inputs; ++i) {
      Quad<T> l[4];
      INV_CONV_UNROLL
      for (int k = 0; k < 4; ++k) l[k] = weight[4 * i + k];
      INV_CONV_UNROLL
      for (int q = 0; q < P; ++q) {
        if (from[q] == nullptr) continue;
        Quad<T> value;
        if (kForm == kFlat) {
          INV_CONV_UNROLL
          for (int k = 0; k < 4; ++k) value.v[k] = 4 * i + k < s.size ? from[q][int64_t(4 * i + k) * s.plane()] : T(0);
        } else {
          value = *reinterpret_cast<const Quad<T>*>(from[q] + 4 * i);
        }
        INV_CONV_UNROLL
        for (int k = 0; k < 4; ++k) {
          INV_CONV_UNROLL
          for (int o = 0; o < 4; ++o) sum[q].v[o] += l[k].v[o] * value.v[k];
        }
      }
    }
  }

  // The sums are complete: this is x.
  INV_CONV_BOTH void finish(int d, int turn, const Item& it, const Quad<T> (&sum)[P]) const {
    INV_CONV_UNROLL
    for (int q = 0; q < P; ++q) {
      if (!here(d, it, q)) continue;
      const int h = top(d) + it.row[q], w = d - h;
      Quad<T> value = sum[q];
      if (kForm == kTile) {
        Quad<T>* at = reinterpret_cast<Quad<T>*>(tile(it.image[q], h, w) + 4 * it.quad);
        const Quad<T> before = *at;
        INV_CONV_UNROLL
        for (int o = 0; o < 4; ++o) value.v[o] += before.v[o];
        *at = value;
        continue;
      }
      if (kForm == kRing) *reinterpret_cast<Quad<T>*>(ring(turn, it.image[q], h) + 4 * it.quad) = value;
      T* to = x + planes(it.image[q]) + place(h, w);
      INV_CONV_UNROLL
      for (int o = 0; o < 4; ++o)
        if (4 * it.quad + o < s.size) to[int64_t(4 * it.quad + o) * s.plane()] = value.v[o];
    }
  }

  // kTile: write the images. Neighbouring threads write neighbouring pixels.
  INV_CONV_BOTH void store(int thread, int threads) const {
    const int pixels = s.plane(), work = count * s.size * pixels;
    for (int n = thread; n < work; n += threads) {
      const int image = n / (pixels * s.size), channel = n / pixels % s.size;
      const int h = n % pixels / s.width, w = n % pixels % s.width;
      x[planes(image) + int64_t(channel) * pixels + place(h, w)] = tile(image, h, w)[channel];
    }
  }
};

}  // namespace wave
}  // namespace inv_conv
