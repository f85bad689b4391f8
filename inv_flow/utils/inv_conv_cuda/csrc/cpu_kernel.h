// The CPU solver, compiled once an instruction set (cpu_generic.cpp, cpu_avx2.cpp, cpu_avx512.cpp define the three macros).
//
// In order TL the unknowns obey, with Li the inverse of the pinned tap and W'_t = Li W_t,
//     x[p] = Li y[p] - sum_t W'_t x[p - t]            (t runs over the other taps; pixels outside the image are 0)
// so channels no longer depend on each other within a pixel. A transposed solve is the same recurrence in the opposite
// direction with Li^T and Li^T W_t^T; a mirrored order only changes where pixels are read and written.
//
// Two loops compute it:
//   batch lanes    a vector holds one pixel and channel of L images; weights are broadcast. Every lane is used from L images on.
//   channel lanes  a vector holds L output channels of one pixel; the pixels of an anti-diagonal share the weights. For small
//                  batches.
//
// Nothing here includes a library header with code in it: a template instantiated with these compiler flags must not be
// merged with one of the same name that runs on other machines.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "cpu_solver.h"

namespace inv_conv {
namespace INV_CONV_ISA {
namespace {

#define INV_CONV_INLINE inline __attribute__((always_inline))

template <typename T, int L>
struct Lanes {
  typedef T V __attribute__((vector_size(L * sizeof(T)), may_alias));
  typedef T Unaligned __attribute__((vector_size(L * sizeof(T)), may_alias, aligned(sizeof(T))));
};
template <typename T, int L>
using Vec = typename Lanes<T, L>::V;

template <typename T, int L>
INV_CONV_INLINE Vec<T, L> load(const T* from) {
  return *reinterpret_cast<const typename Lanes<T, L>::Unaligned*>(from);
}
template <typename T, int L>
INV_CONV_INLINE void store(T* to, Vec<T, L> v) {
  *reinterpret_cast<typename Lanes<T, L>::Unaligned*>(to) = v;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using Type = Indices<I...>;
};

// Exchange the off-diagonal halves of two rows, S lanes wide: one step of a transpose.
template <int S, int L, typename V, int... I>
INV_CONV_INLINE void exchange(V& a, V& b, Indices<I...>) {
  V low = __builtin_shufflevector(a, b, ((I & S) ? L + I - S : I)...);
  b = __builtin_shufflevector(a, b, ((I & S) ? L + I : I + S)...);
  a = low;
}

template <typename T, int L, int S>
INV_CONV_INLINE void transpose_steps(Vec<T, L>* v) {
  if constexpr (S < L) {
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r)
      if (!(r & S)) exchange<S, L>(v[r], v[r + S], typename MakeIndices<L>::Type{});
    transpose_steps<T, L, 2 * S>(v);
  }
}

// L rows of L lanes, transposed in place.
template <typename T, int L>
INV_CONV_INLINE void transpose(Vec<T, L>* v) {
  transpose_steps<T, L, 1>(v);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int at_least(int a, int b) { return a > b ? a : b; }
inline int at_most(int a, int b) { return a < b ? a : b; }

inline int64_t& scratch_total() {
  static int64_t total = 0;
  return total;
}
inline void count_scratch(int64_t bytes) { __atomic_add_fetch(&scratch_total(), bytes, __ATOMIC_RELAXED); }

// Memory of one thread that survives the call: fresh pages cost more than many a solve. Given back when it is large.
struct Scratch {
  static constexpr size_t kKept = size_t(8) << 20;
  char* memory = nullptr;
  size_t bytes = 0;

  template <typename T>
  T* take(size_t count) {
    size_t wanted = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (wanted > bytes) {
      release();
      memory = static_cast<char*>(aligned_alloc(4096, wanted));
      if (!memory) throw std::bad_alloc();
      bytes = wanted;
      count_scratch(int64_t(bytes));
    }
    return reinterpret_cast<T*>(memory);
  }
  void trim() {
    if (bytes > kKept) release();
  }
  void release() {
    free(memory);
    count_scratch(-int64_t(bytes));
    memory = nullptr;
    bytes = 0;
  }
  ~Scratch() { release(); }
};

inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}
inline Scratch& weight_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// ---------------------------------------------------------------------------------------------------------- the recurrence

// Rows of pixels in order TL against where they stand in memory.
template <typename T>
struct Layout {
  int size, height, width, kh, kw;  // kh, kw: taps that can meet a pixel
  int code;                         // of the data: how the solve runs
  int64_t plane;                    // height * width

  template <typename P>
  Layout(const P& p, int group, bool transposed)
      : size(p.size), height(p.height), width(p.width), kh(at_most(p.kh, p.height)), kw(at_most(p.kw, p.width)),
        code(p.codes[group % p.orders] ^ (transposed ? 3 : 0)), plane(int64_t(p.height) * p.width) {}

  // First element in a channel plane of the TL rows [row, row + rows), which lie together.
  int64_t run(int row, int rows) const { return int64_t(code & 2 ? height - row - rows : row) * width; }
  // TL position (row, column within these rows) of element e of that run.
  int row_of(int e, int rows) const { return code & 2 ? rows - 1 - e / width : e / width; }
  int column_of(int e) const { return code & 1 ? width - 1 - e % width : e % width; }
};

// The weights of one group, output channel fastest: `centre` (i, o) is Li and `taps` (column run of each row above, i, o) is
// -Li W_t. Row a of the window is columns w - kw + 1 ... w; in row 0 the last column, the pixel itself, is left out.
template <typename T>
struct Folded {
  int size, kh, kw;
  bool transposed;
  int block;       // output channels in a block; a block's weights lie together
  T* packed;

  int64_t per_block() const { return int64_t(size) * (int64_t(kh) * kw) * block; }
  T* centre(int b) const { return packed + b * per_block(); }
  T* row(int b, int a) const {
    int64_t before = a == 0 ? 0 : (kw - 1) + int64_t(a - 1) * kw;
    return centre(b) + (1 + before) * size * block;
  }
  // Input channels that the pinned tap of outputs [first, last) reads.
  int centre_begin(int first) const { return transposed ? first : 0; }
  int centre_end(int last) const { return transposed ? size : last; }
};

// Fold the pinned tap into the others, in float64, and lay the result out in blocks of `block` outputs (the last one padded
// with zeros). `work` holds 3 * padded * size doubles at least.
template <typename T>
void fold_weights(const Problem<T>& p, int group, Folded<T>& f, double* work) {
  constexpr int L = INV_CONV_VECTOR_BYTES / sizeof(double);
  const int c = p.size, code = p.codes[group % p.orders];
  const int64_t taps = int64_t(p.kh) * p.kw;
  const T* w = p.w + int64_t(group) * c * c * taps;
  auto tap_index = [&](int a, int b) { return int64_t(code & 2 ? a : p.kh - 1 - a) * p.kw + (code & 1 ? b : p.kw - 1 - b); };
  const int64_t own = tap_index(0, 0);
  const int blocks = int(ceil_div(c, f.block));
  const int padded = int(ceil_div(at_least(c, blocks * f.block), L)) * L;

  // left[m][o] = Li[o][m], or Li^T[o][m] when transposed; o runs to `padded`
  double* left = work;
  memset(left, 0, sizeof(double) * size_t(c) * padded);
  double* inverse = work + size_t(c) * padded;  // Li, rows o
  for (int o = 0; o < c; ++o) {
    double* line = inverse + int64_t(o) * c;
    memset(line, 0, sizeof(double) * c);
    line[o] = 1;
    for (int m = 0; m < o; ++m) {
      const double factor = double(w[(int64_t(o) * c + m) * taps + own]);
      if (factor == 0) continue;
      const double* other = inverse + int64_t(m) * c;
      for (int i = 0; i <= m; ++i) line[i] -= factor * other[i];
    }
  }
  for (int o = 0; o < c; ++o)
    for (int m = 0; m <= o; ++m) {
      const double value = inverse[int64_t(o) * c + m];
      if (p.transposed)
        left[int64_t(o) * padded + m] = value;
      else
        left[int64_t(m) * padded + o] = value;
    }

  auto put = [&](const double* values, int64_t line, double sign) {
    for (int b = 0; b < blocks; ++b) {
      T* to = f.packed + b * f.per_block() + line * f.block;
      for (int o = 0; o < f.block; ++o) to[o] = T(sign * values[b * f.block + o]);
    }
  };
  double* sum = inverse;  // no longer needed
  for (int i = 0; i < c; ++i) put(left + int64_t(i) * padded, i, 1);
  int64_t line = c;
  for (int a = 0; a < f.kh; ++a) {
    for (int b = f.kw - 1; b >= (a == 0 ? 1 : 0); --b) {
      const T* tap = w + tap_index(a, b);
      for (int i = 0; i < c; ++i, ++line) {
        // sum over m of left[m][:] W[m][i], in strips of four vectors; left[m] is zero before m (after m when transposed)
        for (int o = 0; o < padded; o += 4 * L) {
          Vec<double, L> acc[4] = {};
          const int vectors = at_most(4, (padded - o) / L);
          const int begin = p.transposed ? o : 0, end = p.transposed ? c : at_most(c, o + 4 * L);
          for (int m = begin; m < end; ++m) {
            const double value = double(tap[(p.transposed ? int64_t(i) * c + m : int64_t(m) * c + i) * taps]);
            const double* from = left + int64_t(m) * padded + o;
            if (vectors == 4) {
#pragma GCC unroll 4
              for (int v = 0; v < 4; ++v) acc[v] += value * load<double, L>(from + v * L);
            } else {
              for (int v = 0; v < vectors; ++v) acc[v] += value * load<double, L>(from + v * L);
            }
          }
          for (int v = 0; v < vectors; ++v) store<double, L>(sum + o + v * L, acc[v]);
        }
        put(sum, line, -1);
      }
    }
  }
}

// --------------------------------------------------------------------------------------------------------------- batch lanes

// What one pixel of L images needs: its y, the row of x above-left of it in each row of the window, and where its x goes.
template <typename T, int L>
struct Pixel {
  const Vec<T, L>* y;       // (i)
  Vec<T, L>* x;             // (o); the pixel to the left lies `size` before it, the pixel above `row` before it
  int64_t row;              // vectors a row
  int size, rows, skip;     // rows of the window that exist; vectors of each run that lie left of the image
};

template <typename T, int L, int OB>
INV_CONV_INLINE void accumulate(Vec<T, L>* acc, const T* w, const Vec<T, L>* x, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const Vec<T, L> value = x[j];
#pragma GCC unroll 24
    for (int o = 0; o < OB; ++o) acc[o] += w[j * OB + o] * value;
  }
}

template <typename T, int L, int OB>
void solve_block(const Folded<T>& f, const T* centre, int first, const Pixel<T, L>& p) {
  Vec<T, L> acc[OB];
#pragma GCC unroll 24
  for (int o = 0; o < OB; ++o) acc[o] = Vec<T, L>{};
  const int begin = f.centre_begin(first), end = f.centre_end(first + OB);
  accumulate<T, L, OB>(acc, centre + int64_t(begin) * OB, p.y + begin, end - begin);
  const int64_t run = int64_t(f.kw) * p.size;
  const T* w = centre + (int64_t(p.size) + run - p.size) * OB;  // row 1 of the window
  for (int a = 1; a < p.rows; ++a, w += run * OB)
    accumulate<T, L, OB>(acc, w + int64_t(p.skip) * OB, p.x - a * p.row - (run - p.size) + p.skip, run - p.skip);
  // last, because it needs the pixel that was solved just before
  if (run - p.size > p.skip)
    accumulate<T, L, OB>(acc, centre + (int64_t(p.size) + p.skip) * OB, p.x - (run - p.size) + p.skip,
                         run - p.size - p.skip);
#pragma GCC unroll 24
  for (int o = 0; o < OB; ++o) p.x[first + o] = acc[o];
}

template <typename T, int L>
using BlockSolver = void (*)(const Folded<T>&, const T*, int, const Pixel<T, L>&);

// A group's outputs in blocks of 24, 12, 8, 4, 2 or 1: as many accumulators as the registers hold.
constexpr int kWidest = INV_CONV_REGISTERS >= 32 ? 24 : 12;
inline int widest_block(int outputs) {
  constexpr int widths[] = {24, 12, 8, 4, 2, 1};
  for (int width : widths)
    if (width <= kWidest && width <= outputs) return width;
  return 1;
}

template <typename T, int L>
BlockSolver<T, L> block_solver(int width) {
  switch (width) {
    case 24: return solve_block<T, L, kWidest>;
    case 12: return solve_block<T, L, 12>;
    case 8: return solve_block<T, L, 8>;
    case 4: return solve_block<T, L, 4>;
    case 2: return solve_block<T, L, 2>;
    default: return solve_block<T, L, 1>;
  }
}

// From single-output blocks (o, lines) to blocks of several widths, each (lines, width).
template <typename T>
void group_blocks(const T* plain, T* packed, int size, int64_t lines) {
  for (int first = 0; first < size;) {
    const int width = widest_block(size - first);
    T* to = packed + first * lines;
    for (int64_t j = 0; j < lines; ++j)
      for (int o = 0; o < width; ++o) to[j * width + o] = plain[j * size + first + o];
    first += width;
  }
}

// Move rows of L images (fewer at the end of the batch) between planes in memory and pixels of lanes (pixel, channel, lane).
template <typename T, int L, bool kOut>
void move_rows(T* const* images, int count, int64_t plane, int size, int64_t run, int pixels, const int32_t* where, T* lanes) {
  Vec<T, L> v[L];
  for (int i = 0; i < size; ++i) {
    const int64_t from = i * plane + run;
    int e = 0;
    while (e < pixels) {
      if (pixels - e < L) {
        if (pixels < L) break;
        e = pixels - L;  // the last step covers some pixels again
      }
      if (kOut) {
#pragma GCC unroll 16
        for (int t = 0; t < L; ++t) v[t] = load<T, L>(lanes + (int64_t(where[e + t]) * size + i) * L);
        transpose<T, L>(v);
#pragma GCC unroll 16
        for (int t = 0; t < L; ++t)
          if (t < count) store<T, L>(images[t] + from + e, v[t]);
      } else {
#pragma GCC unroll 16
        for (int t = 0; t < L; ++t) v[t] = load<T, L>(images[t] + from + e);
        transpose<T, L>(v);
#pragma GCC unroll 16
        for (int t = 0; t < L; ++t) store<T, L>(lanes + (int64_t(where[e + t]) * size + i) * L, v[t]);
      }
      e += L;
    }
    for (; e < pixels; ++e)  // an image smaller than a vector
      for (int t = 0; t < L; ++t) {
        T* lane = lanes + (int64_t(where[e]) * size + i) * L + t;
        if (!kOut)
          *lane = images[t][from + e];
        else if (t < count)
          images[t][from + e] = *lane;
      }
  }
}

// Rows that are brought in at once: enough for whole vectors, few enough for the cache.
template <typename T>
int slab_rows(const Layout<T>& at, int64_t row_bytes, int lanes) {
  constexpr int64_t kCache = 256 << 10;
  const int fits = int(at_most(1 << 20, int(kCache / (2 * row_bytes + 1)))) - (at.kh - 1) / 2;
  const int whole = int(ceil_div(lanes, at.width));
  return at_most(at.height, at_least(whole, fits));
}

template <typename T, int L>
void solve_batch_unit(const Problem<T>& p, const T* weights, int64_t first, int count, int group) {
  const Layout<T> at(p, group, p.transposed);
  const int c = at.size;
  const int64_t row = int64_t(at.width) * c;  // vectors a row
  const int slab = slab_rows(at, row * L * int64_t(sizeof(T)), L);
  const int above = at.kh - 1;
  const size_t in = size_t(row) * slab * L, out = size_t(row) * (slab + above) * L;
  T* y = thread_scratch().template take<T>(in + out + size_t(slab) * at.width * sizeof(int32_t) / sizeof(T) + 16);
  T* x = y + in;
  int32_t* where = reinterpret_cast<int32_t*>(x + out);

  const T* from[L];
  T* to[L];
  for (int t = 0; t < L; ++t) {
    const int64_t image = ((first + at_most(t, count - 1)) * p.groups + group) * c * at.plane;
    from[t] = p.y + image;
    to[t] = p.x + image;
  }
  Folded<T> f{c, at.kh, at.kw, p.transposed, 1, nullptr};
  const int64_t lines = int64_t(c) * at.kh * at.kw;
  int rows_mapped = 0;
  for (int top = 0; top < at.height; top += slab) {
    const int rows = at_most(slab, at.height - top), pixels = rows * at.width;
    if (rows != rows_mapped) {
      for (int e = 0; e < pixels; ++e) where[e] = at.row_of(e, rows) * at.width + at.column_of(e);
      rows_mapped = rows;
    }
    if (top > 0) memmove(x, x + size_t(row) * slab * L, size_t(row) * above * L * sizeof(T));
    move_rows<T, L, false>(const_cast<T* const*>(from), count, at.plane, c, at.run(top, rows), pixels, where, y);
    T* solved = x + size_t(row) * above * L;
    for (int h = 0; h < rows; ++h) {
      for (int v = 0; v < at.width; ++v) {
        const int64_t pixel = (int64_t(h) * at.width + v) * c * L;
        Pixel<T, L> px{reinterpret_cast<const Vec<T, L>*>(y + pixel), reinterpret_cast<Vec<T, L>*>(solved + pixel), row, c,
                       at_most(at.kh, top + h + 1), at_least(0, at.kw - 1 - v) * c};
        for (int o = 0; o < c;) {
          const int width = widest_block(c - o);
          block_solver<T, L>(width)(f, weights + o * lines, o, px);
          o += width;
        }
      }
    }
    move_rows<T, L, true>(to, count, at.plane, c, at.run(top, rows), pixels, where, solved);
  }
}

// ------------------------------------------------------------------------------------------------------------- channel lanes

// A row of P pixels that share weights: x (or y) of each, and NV vectors of outputs.
template <typename T, int L, int NV, int P>
INV_CONV_INLINE void accumulate_channels(Vec<T, L> (&acc)[P][NV], const T* w, T* const* x, int64_t offset, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Vec<T, L> weight[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) weight[v] = load<T, L>(w + (i * NV + v) * L);
#pragma GCC unroll 16
    for (int q = 0; q < P; ++q) {
      const T value = x[q][offset + i];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[q][v] += value * weight[v];
    }
  }
}

template <typename T>
struct ChannelRun {
  int size, padded;    // input channels of a pixel, and its stride
  int64_t row;         // stride of a row
  int kh, kw;
};

// Outputs [first, first + NV * L) of P solved-next pixels, x[q] holding Li y until now.
template <typename T, int L, int NV, int P>
void solve_channels(const ChannelRun<T>& r, const T* taps, T* const* pixels, int first) {
  T* x[P];
  Vec<T, L> acc[P][NV];
#pragma GCC unroll 16
  for (int q = 0; q < P; ++q) {
    x[q] = pixels[q];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[q][v] = load<T, L>(x[q] + first + v * L);
  }
  const T* w = taps;
  for (int a = 0; a < r.kh; ++a)
    for (int b = r.kw - 1; b >= (a == 0 ? 1 : 0); --b, w += int64_t(r.size) * NV * L)
      accumulate_channels<T, L, NV, P>(acc, w, x, -(a * r.row + int64_t(b) * r.padded), r.size);
#pragma GCC unroll 16
  for (int q = 0; q < P; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store<T, L>(x[q] + first + v * L, acc[q][v]);
}

// to[q][first ...] = Li y[q]
template <typename T, int L, int NV, int P>
void apply_centre(const T* w, T* const* y, T* const* to, int first, int begin, int end) {
  Vec<T, L> acc[P][NV] = {};
  accumulate_channels<T, L, NV, P>(acc, w + int64_t(begin) * NV * L, y, begin, end - begin);
  for (int q = 0; q < P; ++q)
    for (int v = 0; v < NV; ++v) store<T, L>(to[q] + first + v * L, acc[q][v]);
}

// Pixels taken together: accumulators P * NV, NV weights and one value must fit in the registers.
template <int NV>
constexpr int most_pixels() {
  return INV_CONV_REGISTERS >= 32 ? (NV == 1 ? 12 : 8) : (NV == 1 ? 8 : 4);
}

template <typename T, int L, int NV, int P>
void sweep(const ChannelRun<T>& r, const T* taps, T* const* pixels, int count, int first) {
  int q = 0;
  for (; q + P <= count; q += P) solve_channels<T, L, NV, P>(r, taps, pixels + q, first);
  if constexpr (P > 1) {
    constexpr int next = P == 12 ? 8 : P / 2;
    if (q < count) sweep<T, L, NV, next>(r, taps, pixels + q, count - q, first);
  }
}

template <typename T, int L, int NV>
void sweep_centre(const T* w, T* const* y, T* const* to, int count, int first, int begin, int end) {
  int q = 0;
  constexpr int P = most_pixels<NV>();
  for (; q + P <= count; q += P) apply_centre<T, L, NV, P>(w, y + q, to + q, first, begin, end);
  for (; q < count; ++q) apply_centre<T, L, NV, 1>(w, y + q, to + q, first, begin, end);
}

// Rows of one image between planes in memory and pixels of channels; where[e] is the offset of pixel e.
template <typename T, int L, bool kOut>
void move_channels(T* image, int64_t plane, int size, int64_t run, int pixels, const int64_t* where, T* lanes) {
  Vec<T, L> v[L];
  for (int i = 0; i < size; i += L) {
    const int channels = at_most(L, size - i);
    int e = 0;
    while (e < pixels) {
      if (pixels - e < L) {
        if (pixels < L) break;
        e = pixels - L;
      }
      if (kOut) {
#pragma GCC unroll 16
        for (int t = 0; t < L; ++t) v[t] = load<T, L>(lanes + where[e + t] + i);
        transpose<T, L>(v);
#pragma GCC unroll 16
        for (int t = 0; t < L; ++t)
          if (t < channels) store<T, L>(image + (i + t) * plane + run + e, v[t]);
      } else {
#pragma GCC unroll 16
        for (int t = 0; t < L; ++t) v[t] = load<T, L>(image + (i + at_most(t, channels - 1)) * plane + run + e);
        transpose<T, L>(v);
#pragma GCC unroll 16
        for (int t = 0; t < L; ++t) store<T, L>(lanes + where[e + t] + i, v[t]);
      }
      e += L;
    }
    for (; e < pixels; ++e)
      for (int t = 0; t < channels; ++t) {
        T& here = image[(i + t) * plane + run + e];
        T& lane = lanes[where[e] + i + t];
        if (kOut)
          here = lane;
        else
          lane = here;
      }
  }
}

constexpr int kMostVectors = 3;

template <typename T, int L>
void solve_channel_unit(const Problem<T>& p, const T* weights, int64_t first, int count, int group) {
  const Layout<T> at(p, group, p.transposed);
  const int c = at.size, vectors = int(ceil_div(c, L)), padded = vectors * L;
  const int left = at.kw - 1, above = at.kh - 1;
  const int64_t row = int64_t(at.width + left) * padded, image = row * (at.height + above);
  const int slab = slab_rows(at, int64_t(at.width) * padded * int64_t(sizeof(T)), L);
  const size_t in = size_t(slab) * at.width * padded;
  const size_t tables = size_t(slab) * at.width * (2 * sizeof(int64_t) + 2 * sizeof(T*)) + size_t(count) * at.height * sizeof(T*);
  T* y = thread_scratch().template take<T>(in + size_t(image) * count + tables / sizeof(T) + 64);
  T* x = y + in;
  int64_t* in_y = reinterpret_cast<int64_t*>(x + image * count);
  int64_t* in_x = in_y + size_t(slab) * at.width;
  T** sources = reinterpret_cast<T**>(in_x + size_t(slab) * at.width);
  T** targets = sources + size_t(slab) * at.width;
  T** wave = targets + size_t(slab) * at.width;

  const int64_t lines = int64_t(c) * at.kh * at.kw;
  auto blocks = [&](auto visit) {
    for (int v = 0; v < vectors; v += kMostVectors) visit(v, at_most(kMostVectors, vectors - v));
  };
  for (int t = 0; t < count; ++t) {
    T* own = x + t * image;
    const int64_t planes = ((first + t) * p.groups + group) * c * at.plane;
    memset(own, 0, sizeof(T) * size_t(row) * above);
    for (int top = 0; top < at.height; top += slab) {
      const int rows = at_most(slab, at.height - top), pixels = rows * at.width;
      for (int e = 0; e < pixels; ++e) in_y[e] = int64_t(at.row_of(e, rows) * at.width + at.column_of(e)) * padded;
      move_channels<T, L, false>(const_cast<T*>(p.y) + planes, at.plane, c, at.run(top, rows), pixels, in_y, y);
      for (int h = 0; h < rows; ++h) {
        T* line = own + (top + h + above) * row;
        memset(line, 0, sizeof(T) * size_t(left) * padded);
        for (int v = 0; v < at.width; ++v) {
          sources[h * at.width + v] = y + int64_t(h * at.width + v) * padded;
          targets[h * at.width + v] = line + int64_t(left + v) * padded;
        }
      }
      blocks([&](int v, int nv) {
        const T* w = weights + v * L * lines;
        const int begin = p.transposed ? v * L : 0, end = p.transposed ? c : at_most(c, (v + nv) * L);
        switch (nv) {
          case 1: return sweep_centre<T, L, 1>(w, sources, targets, pixels, v * L, begin, end);
          case 2: return sweep_centre<T, L, 2>(w, sources, targets, pixels, v * L, begin, end);
          default: return sweep_centre<T, L, 3>(w, sources, targets, pixels, v * L, begin, end);
        }
      });
    }
  }

  const ChannelRun<T> r{c, padded, row, at.kh, at.kw};
  for (int d = 0; d < at.height + at.width - 1; ++d) {
    const int h0 = at_least(0, d - at.width + 1), h1 = at_most(d, at.height - 1);
    int n = 0;
    for (int t = 0; t < count; ++t)
      for (int h = h0; h <= h1; ++h) wave[n++] = x + t * image + (h + above) * row + int64_t(d - h + left) * padded;
    blocks([&](int v, int nv) {
      const T* w = weights + v * L * lines + int64_t(c) * nv * L;
      switch (nv) {
        case 1: return sweep<T, L, 1, most_pixels<1>()>(r, w, wave, n, v * L);
        case 2: return sweep<T, L, 2, most_pixels<2>()>(r, w, wave, n, v * L);
        default: return sweep<T, L, 3, most_pixels<3>()>(r, w, wave, n, v * L);
      }
    });
  }

  for (int t = 0; t < count; ++t) {
    const int64_t planes = ((first + t) * p.groups + group) * c * at.plane;
    for (int top = 0; top < at.height; top += slab) {
      const int rows = at_most(slab, at.height - top), pixels = rows * at.width;
      for (int e = 0; e < pixels; ++e)
        in_x[e] = (top + at.row_of(e, rows) + above) * row + int64_t(left + at.column_of(e)) * padded;
      move_channels<T, L, true>(p.x + planes, at.plane, c, at.run(top, rows), pixels, in_x, x + t * image);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------- plan

// How the batch is cut: units of `lanes` images in batch lanes, or of `images` images in channel lanes.
struct Plan {
  bool channels;
  int lanes;
  int images;
};

// Time of one vector operation, by its lanes, in operations of the widest vector. Halves are not half as dear.
inline double lane_cost(int bytes) { return bytes >= INV_CONV_VECTOR_BYTES ? 1.0 : 2 * bytes >= INV_CONV_VECTOR_BYTES ? 0.6 : 0.55; }

template <typename T>
Plan choose_plan(const Problem<T>& p) {
  constexpr int L = INV_CONV_VECTOR_BYTES / sizeof(T);
  const int kh = at_most(p.kh, p.height), kw = at_most(p.kw, p.width);
  // part of the taps that lies inside the image: batch lanes skip the others
  const double inside = (1 - 0.5 * (kh - 1) / p.height) * (1 - 0.5 * (kw - 1) / p.width);
  Plan best{true, L, 0};
  best.images = at_least(1, 8 / at_most(p.height, p.width));
  best.images = at_most(best.images, at_least(1, int(p.batch / p.threads)));
  const double rounds = double(ceil_div(ceil_div(p.batch, best.images) * p.groups, p.threads));
  double least = rounds * best.images * double(ceil_div(p.size, L)) * 1.2;
  for (int lanes = L; lanes * int(sizeof(T)) >= 16; lanes /= 2) {
    const double cost = double(ceil_div(ceil_div(p.batch, lanes) * p.groups, p.threads)) * p.size * inside *
                        lane_cost(lanes * int(sizeof(T)));
    if (cost < 0.999 * least) {
      least = cost;
      best = Plan{false, lanes, 0};
    }
  }
  return best;
}

template <typename T>
struct Job {
  const Problem<T>* p;
  const T* weights;
  int64_t group_weights;
  Plan plan;
};

template <typename T, int L>
void batch_unit(const Job<T>& job, int64_t first, int count, int group) {
  const T* weights = job.weights + group * job.group_weights;
  // the last images of a batch take narrower vectors when these are enough
  if constexpr (L * sizeof(T) > 16) {
    if (2 * count <= L) return batch_unit<T, L / 2>(job, first, count, group);
  }
  solve_batch_unit<T, L>(*job.p, weights, first, count, group);
}

template <typename T>
void run_units(void* context, int64_t begin, int64_t end) {
  constexpr int L = INV_CONV_VECTOR_BYTES / sizeof(T);
  const Job<T>& job = *static_cast<const Job<T>*>(context);
  const Problem<T>& p = *job.p;
  const int step = job.plan.channels ? job.plan.images : job.plan.lanes;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int group = int(unit % p.groups);
    const int64_t first = unit / p.groups * step;
    const int count = int(p.batch - first < step ? p.batch - first : step);
    if (job.plan.channels) {
      solve_channel_unit<T, L>(p, job.weights + group * job.group_weights, first, count, group);
    } else {
      batch_unit<T, L>(job, first, count, group);
    }
  }
  thread_scratch().trim();
}

template <typename T>
void solve_any(const Problem<T>& p) {
  constexpr int L = INV_CONV_VECTOR_BYTES / sizeof(T);
  const int kh = at_most(p.kh, p.height), kw = at_most(p.kw, p.width);
  Job<T> job;
  job.p = &p;
  job.plan = choose_plan(p);
  const int c = p.size, vectors = int(ceil_div(c, L)), outputs = at_least(vectors * L, c);
  const int64_t lines = int64_t(c) * kh * kw;
  job.group_weights = (lines * outputs + 15) / 16 * 16;
  const size_t work = 2 * size_t(c) * (outputs + 64) + 64;
  double* doubles = weight_scratch().template take<double>(work + (size_t(job.group_weights) * p.groups + size_t(lines) * outputs) * sizeof(T) / sizeof(double) + 64);
  T* packed = reinterpret_cast<T*>(doubles + work);
  T* plain = packed + job.group_weights * p.groups;
  for (int g = 0; g < p.groups; ++g) {
    T* to = packed + g * job.group_weights;
    if (job.plan.channels) {
      // one fold for all outputs, then blocks of up to three vectors
      Folded<T> f{c, kh, kw, p.transposed, vectors <= kMostVectors ? outputs : L, vectors <= kMostVectors ? to : plain};
      fold_weights(p, g, f, doubles);
      if (vectors > kMostVectors)
        for (int v = 0; v < vectors; v += kMostVectors) {
          const int nv = at_most(kMostVectors, vectors - v);
          for (int u = 0; u < nv; ++u)
            for (int64_t j = 0; j < lines; ++j)
              memcpy(to + v * L * lines + (j * nv + u) * L, plain + (v + u) * L * lines + j * L, L * sizeof(T));
        }
    } else {
      Folded<T> f{c, kh, kw, p.transposed, c, widest_block(c) == c ? to : plain};
      fold_weights(p, g, f, doubles);
      if (f.packed == plain) group_blocks(plain, to, c, lines);
    }
  }
  job.weights = packed;
  const int64_t step = job.plan.channels ? job.plan.images : job.plan.lanes;
  p.parallel_for(ceil_div(p.batch, step) * p.groups, run_units<T>, &job);
  weight_scratch().trim();
}

// ----------------------------------------------------------------------------------------------------------- kernel gradient

// The gradient of tap t is sum_p g[p] x[p - t]^T over all images and pixels: a product of channels, in batch lanes. A block of
// outputs and inputs stays in registers while a few rows go by, near enough to be read again for the next block and tap; the
// lanes are added up at the end.

constexpr int kOutputs = 4, kInputs = INV_CONV_REGISTERS >= 32 ? 6 : 3;

// acc[o][i] += g[o] x[i] over `rows` rows of `pixels` pixels; strides in elements.
template <typename T, int L, int OB, int IB>
void correlate(T* sums, const T* g, const T* x, int rows, int pixels, int64_t pixel, int64_t row) {
  Vec<T, L> acc[OB][IB];
#pragma GCC unroll 4
  for (int o = 0; o < OB; ++o)
#pragma GCC unroll 6
    for (int i = 0; i < IB; ++i) acc[o][i] = load<T, L>(sums + (o * IB + i) * L);
  for (int h = 0; h < rows; ++h) {
    const T *at_g = g + h * row, *at_x = x + h * row;
    for (int v = 0; v < pixels; ++v, at_g += pixel, at_x += pixel) {
      Vec<T, L> seen[IB];
#pragma GCC unroll 6
      for (int i = 0; i < IB; ++i) seen[i] = load<T, L>(at_x + i * L);
#pragma GCC unroll 4
      for (int o = 0; o < OB; ++o) {
        const Vec<T, L> value = load<T, L>(at_g + o * L);
#pragma GCC unroll 6
        for (int i = 0; i < IB; ++i) acc[o][i] += value * seen[i];
      }
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < OB; ++o)
#pragma GCC unroll 6
    for (int i = 0; i < IB; ++i) store<T, L>(sums + (o * IB + i) * L, acc[o][i]);
}

template <typename T>
using Correlate = void (*)(T*, const T*, const T*, int, int, int64_t, int64_t);

template <typename T, int L, int OB>
Correlate<T> correlate_of(int inputs) {
  if constexpr (kInputs > 3) {
    if (inputs == 6) return correlate<T, L, OB, 6>;
    if (inputs == 5) return correlate<T, L, OB, 5>;
    if (inputs == 4) return correlate<T, L, OB, 4>;
  }
  return inputs == 3 ? correlate<T, L, OB, 3> : inputs == 2 ? correlate<T, L, OB, 2> : correlate<T, L, OB, 1>;
}

template <typename T, int L>
Correlate<T> correlate_of(int outputs, int inputs) {
  switch (outputs) {
    case 4: return correlate_of<T, L, 4>(inputs);
    case 3: return correlate_of<T, L, 3>(inputs);
    case 2: return correlate_of<T, L, 2>(inputs);
    default: return correlate_of<T, L, 1>(inputs);
  }
}

// Work is cut into chunks of the batch, whose sums are added up in order, and, where threads are left, into parts of the
// outputs. The chunks do not depend on the threads, so the result does not either.
template <typename T>
struct KernelJob {
  const KernelProblem<T>* p;
  T* partial;  // (chunks, groups * size, size, taps)
  int lanes, chunks, parts;
  int64_t units, count;  // of `lanes` images; elements of a gradient
};

// Outputs [begin, end) of one group, over the units of one chunk.
template <typename T, int L>
void gradient_chunk(const KernelJob<T>& job, int group, int chunk, int begin, int end) {
  const KernelProblem<T>& p = *job.p;
  const Layout<T> at(p, group, false);
  const int c = at.size, taps = at.kh * at.kw, above = at.kh - 1;
  const int64_t pixel = int64_t(c) * L, row = int64_t(at.width) * pixel;
  const int slab = slab_rows(at, row * int64_t(sizeof(T)), L);
  constexpr int64_t kNear = 48 << 10;  // of rows that are read again and again
  const int near = at_least(1, int(kNear / (2 * row * int64_t(sizeof(T)) + 1)));
  const size_t in = size_t(row) * slab, seen = size_t(row) * (slab + above), sums = size_t(taps) * (end - begin) * c * L;
  T* g = thread_scratch().template take<T>(in + seen + sums + size_t(slab) * at.width * sizeof(int32_t) / sizeof(T) + 16);
  T *x = g + in, *sum = x + seen;
  int32_t* where = reinterpret_cast<int32_t*>(sum + sums);
  memset(sum, 0, sums * sizeof(T));

  // `each` block of outputs and inputs of every tap, with the place of its sums
  auto blocks = [&](auto each) {
    T* to = sum;
    for (int t = 0; t < taps; ++t)
      for (int o = begin; o < end; o += kOutputs) {
        const int outputs = at_most(kOutputs, end - o);
        for (int i = 0; i < c; i += kInputs) {
          const int inputs = at_most(kInputs, c - i);
          // of the tap on the pixel itself only the inputs before the output are free
          if (t > 0 || i < o + outputs) each(to, t / at.kw, t % at.kw, o, i, outputs, inputs);
          to += outputs * inputs * L;
        }
      }
  };
  const int64_t last = job.units * (chunk + 1) / job.chunks;
  for (int64_t unit = job.units * chunk / job.chunks; unit < last; ++unit) {
    const int64_t first = unit * L;
    const int count = int(p.batch - first < L ? p.batch - first : L);
    T *from_x[L], *from_g[L];
    for (int t = 0; t < L; ++t) {
      const int64_t image = ((first + at_most(t, count - 1)) * p.groups + group) * c * at.plane;
      from_x[t] = const_cast<T*>(p.x) + image;
      from_g[t] = const_cast<T*>(p.g) + image;
    }
    for (int top = 0; top < at.height; top += slab) {
      const int rows = at_most(slab, at.height - top), pixels = rows * at.width;
      for (int e = 0; e < pixels; ++e) where[e] = at.row_of(e, rows) * at.width + at.column_of(e);
      if (top > 0) memmove(x, x + size_t(row) * slab, size_t(row) * above * sizeof(T));
      T* own = x + size_t(row) * above;
      move_rows<T, L, false>(from_x, count, at.plane, c, at.run(top, rows), pixels, where, own);
      move_rows<T, L, false>(from_g, count, at.plane, c, at.run(top, rows), pixels, where, g);
      if (count < L)  // lanes without an image count nothing
        for (int64_t n = 0; n < pixels * int64_t(c); ++n)
          for (int t = count; t < L; ++t) g[n * L + t] = T(0);
      for (int h = 0; h < rows; h += near) {
        const int stop = at_most(h + near, rows);
        blocks([&](T* to, int a, int b, int o, int i, int outputs, int inputs) {
          const int start = at_least(h, a - top);  // rows above the image are 0
          if (start < stop)
            correlate_of<T, L>(outputs, inputs)(to, g + start * row + b * pixel + o * L, own + (start - a) * row + i * L,
                                                stop - start, at.width - b, pixel, row);
        });
      }
    }
  }

  T* gradient = job.partial + chunk * job.count + int64_t(group) * c * c * p.kh * p.kw;
  blocks([&](const T* from, int a, int b, int o, int i, int outputs, int inputs) {
    const int64_t tap = int64_t(at.code & 2 ? a : p.kh - 1 - a) * p.kw + (at.code & 1 ? b : p.kw - 1 - b);
    for (int n = 0; n < outputs; ++n)
      for (int m = 0; m < inputs; ++m, from += L) {
        if (a + b == 0 && i + m >= o + n) continue;
        T total = 0;
        for (int t = 0; t < L; ++t) total += from[t];
        gradient[(int64_t(o + n) * c + i + m) * p.kh * p.kw + tap] = total;
      }
  });
}

template <typename T>
void run_chunks(void* context, int64_t begin, int64_t end) {
  constexpr int L = INV_CONV_VECTOR_BYTES / sizeof(T);
  const KernelJob<T>& job = *static_cast<const KernelJob<T>*>(context);
  const int c = job.p->size;
  for (int64_t n = begin; n < end; ++n) {
    const int part = int(n % job.parts), chunk = int(n / job.parts % job.chunks), group = int(n / job.parts / job.chunks);
    const int blocks = int(ceil_div(c, kOutputs));
    const int first = blocks * part / job.parts * kOutputs, last = at_most(c, blocks * (part + 1) / job.parts * kOutputs);
    if (first >= last) continue;
    if (job.lanes == L) {
      gradient_chunk<T, L>(job, group, chunk, first, last);
    } else if constexpr (L * sizeof(T) > 16) {
      if (job.lanes == L / 2) {
        gradient_chunk<T, L / 2>(job, group, chunk, first, last);
      } else if constexpr (L * sizeof(T) > 32) {
        gradient_chunk<T, L / 4>(job, group, chunk, first, last);
      }
    }
  }
  thread_scratch().trim();
}

template <typename T>
void kernel_gradient_any(const KernelProblem<T>& p) {
  constexpr int L = INV_CONV_VECTOR_BYTES / sizeof(T);
  KernelJob<T> job;
  job.p = &p;
  job.lanes = L;
  double least = double(ceil_div(p.batch, L));
  for (int lanes = L / 2; lanes * int(sizeof(T)) >= 16; lanes /= 2) {
    const double cost = double(ceil_div(p.batch, lanes)) * lane_cost(lanes * int(sizeof(T)));
    if (cost < 0.999 * least) {
      least = cost;
      job.lanes = lanes;
    }
  }
  job.units = ceil_div(p.batch, job.lanes);
  job.count = int64_t(p.groups) * p.size * p.size * p.kh * p.kw;
  // partial sums take half an activation at most
  const int64_t room = p.batch * p.groups * p.size * p.height * p.width / (2 * job.count + 1);
  job.chunks = at_least(1, int(job.units < 16 ? job.units : 16));
  if (room < job.chunks) job.chunks = at_least(1, int(room));
  job.parts = at_least(1, int(ceil_div(p.threads, job.chunks * int64_t(p.groups))));
  job.parts = at_most(job.parts, int(ceil_div(p.size, kOutputs)));
  job.partial = job.chunks == 1 ? p.gradient : weight_scratch().template take<T>(size_t(job.chunks) * job.count);
  memset(job.partial, 0, size_t(job.chunks) * job.count * sizeof(T));
  p.parallel_for(int64_t(p.groups) * job.chunks * job.parts, run_chunks<T>, &job);
  if (job.chunks > 1)
    for (int64_t n = 0; n < job.count; ++n) {
      T total = 0;
      for (int chunk = 0; chunk < job.chunks; ++chunk) total += job.partial[chunk * job.count + n];
      p.gradient[n] = total;
    }
  weight_scratch().trim();
}

}  // namespace

void solve(const Problem<float>& p) { solve_any(p); }
void solve(const Problem<double>& p) { solve_any(p); }
void kernel_gradient(const KernelProblem<float>& p) { kernel_gradient_any(p); }
void kernel_gradient(const KernelProblem<double>& p) { kernel_gradient_any(p); }
int64_t scratch_bytes() { return __atomic_load_n(&scratch_total(), __ATOMIC_RELAXED); }

}  // namespace INV_CONV_ISA
}  // namespace inv_conv
