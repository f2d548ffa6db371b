// What the copy engine and the Hopper kernels are told of a problem: host logic, without a GPU.
#pragma once

#include <cstdint>

#include "plan.h"
#include "problem.h"
#include "schedule.h"

namespace laco {

constexpr int BK = STEP;  // of the depth, a slot: 128 bytes of a K-major operand, the width of the swizzle; or 64 lines
constexpr int PIECE_ROWS = 16, PIECE_COLUMNS = 64;  // of the result, that a warp writes at a time

// Tokens as a kernel finds them by itself.
struct Image {
  const uint16_t* base;
  int64_t stride_b, stride_t;
  int per_image, out_width;  // rows: windows
  int height, width, side, channels;

  Image() = default;
  explicit Image(const Tokens& t)
      : base(static_cast<const uint16_t*>(t.sources[0])), stride_b(t.stride_b), stride_t(t.stride_t),
        per_image(int(t.rows_per_image())), out_width(t.out_width()), height(t.height), width(t.width), side(t.side),
        channels(t.channels) {}
};

// How the copy engine finds rows: row q of an image is the window whose first pixel is (q % out_width, q / out_width) * side.
struct Rows {
  int im2col;  // 0: the tensor map is a plain matrix
  int per_image, out_width, side;
};

// A tensor map before the driver encodes it. What lies outside of the tensor arrives as zero and is not written.
struct Map {
  const void* base;
  int rank;            // 0: there is none
  int64_t sizes[4];    // channels first
  int64_t strides[3];  // in elements, of all dimensions but the channels
  int box[3];          // elements of a copy in each dimension; of an im2col map channels and rows
  int side;            // of an im2col map: pixels from one row to the next; else 0
};

// Everything that a kernel is told but the encoded maps.
struct Arguments {
  Rows rows, other_rows, added_rows;
  const uint16_t* bias;  // [n] or null
  float* sums;           // of columns, or null
  uint16_t* out_tokens;  // rows that no tensor map describes: behind prefix tokens, or windows' tokens
  Image residual;        // tokens, or gradients of windows, that are read without the copy engine
  Image grid;            // of the tokens that an input gradient is written to
  Residual residual_kind;
  int out_prefix;
  int m, n;     // rows of the result; columns, of one tap
  int columns;  // in all: n, or of a gradient 64 a chunk
  int sources_count, steps, channel_steps;
  int taps, chunks_a_tap;  // of a gradient's columns
  int has_second;
  int group, splits;
};

// Boxes are 64 channels wide.
struct Maps {
  Map sources[MAX_SOURCES];  // tokens, BM rows as A (the gradient too), 64 rows as B of a weight gradient
  Map other;                 // weight (channel, tap, n) as B, 1 tap x (BN or 64); the gradient as A of a weight gradient
  Map out;                   // 16 rows, written by one warp; for a weight gradient 1 tap x 16 rows
  Map second;                // the like: the pre-activation of a forward product, the activation of an input gradient
  Map added;                 // BM rows: the residual's tokens, or the pre-activation to go back through
};

struct Description {
  Arguments arguments;
  Maps maps;
  bool copied;  // the copy engine brings what is added, or gone back through
};

inline Map map_matrix(const void* base, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  return {base, 2, {columns, rows}, {stride}, {64, box_rows}, 0};
}

// [n, taps, channels]. Taps are a dimension of their own, so that a width that 64 does not divide ends in zeros and not in the
// next tap.
inline Map map_taps(const void* base, int64_t n, int64_t taps, int64_t channels, int box_rows) {
  return {base, 3, {channels, taps, n}, {channels, taps * channels}, {64, 1, box_rows}, 0};
}

// Pixels (x, y, b) in steps of a window's side. Every pixel of the image may be a window's first; those of windows that the image
// does not fill have taps outside, which arrive as zeros.
inline Map map_im2col(const void* base, const Tokens& t, int height, int width, int box_rows) {
  // One image may come with any stride; the encoder wants at least its size.
  const int64_t line = width * t.stride_t, image = t.batch > 1 ? t.stride_b : height * line;
  return {base, 4, {t.channels, width, height, t.batch}, {t.stride_t, line, image}, {64, box_rows}, t.side};
}

// One map a source.
inline void map_rows(Map* maps, Rows& rows, const Tokens& t, int box_rows) {
  const int64_t tokens = int64_t(t.height) * t.width;
  const bool one_matrix = t.side == 1 && (t.batch == 1 || t.stride_b == tokens * t.stride_t);
  // Tokens by themselves are a line: an image's lines follow each other.
  const int height = t.side == 1 ? 1 : t.height, width = t.side == 1 ? int(tokens) : t.width;
  rows = Rows{!one_matrix, int(t.rows_per_image()), (width + t.side - 1) / t.side, t.side};
  for (int i = 0; i < t.num_sources; ++i) {
    maps[i] = one_matrix ? map_matrix(t.sources[i], t.rows(), t.channels, t.stride_t, box_rows)
                         : map_im2col(t.sources[i], t, height, width, box_rows);
  }
}

inline Description describe(const Forward& q, int bm, int bn, int splits) {
  Description d{};
  Arguments& p = d.arguments;
  p.m = int(q.x.rows()), p.n = p.columns = q.n, p.bias = static_cast<const uint16_t*>(q.bias);
  p.sources_count = q.x.num_sources, p.channel_steps = int(steps_of(q.x.channels)), p.steps = int(steps_of(q));
  p.taps = 1, p.chunks_a_tap = int(chunks_of(1, q.n));
  p.out_tokens = static_cast<uint16_t*>(q.out), p.out_prefix = q.out_prefix, p.has_second = q.pre != nullptr;
  p.residual_kind = q.residual_kind, p.group = GROUP, p.splits = splits;
  map_rows(d.maps.sources, p.rows, q.x, bm);
  d.maps.other = map_taps(q.weight, q.n, q.x.num_sources * q.x.taps(), q.x.channels, bn);
  d.maps.out = map_matrix(q.out, p.m, q.n, q.n, PIECE_ROWS);
  if (q.pre) d.maps.second = map_matrix(q.pre, p.m, q.n, q.n, PIECE_ROWS);
  if (q.residual_kind != Residual::none) p.residual = Image(residual_tokens(q));
  d.copied = q.residual_kind == Residual::mean && splits == 1;
  if (d.copied && q.residual_block) {
    const int64_t window = q.residual.taps() * q.n;
    p.added_rows = Rows{0, int(q.residual.rows_per_image()), q.residual.out_width(), q.residual.side};
    d.maps.added = map_matrix(q.residual.sources[0], p.m, window, window, bm);
  } else if (d.copied) {
    map_rows(&d.maps.added, p.added_rows, q.residual, bm);
  }
  return d;
}

inline Description describe(const InputGradient& q, int bm, int bn, int) {
  Description d{};
  Arguments& p = d.arguments;
  p.m = int(q.gradient.rows()), p.n = q.channels, p.columns = int(columns_of(q));
  p.sources_count = 1, p.steps = p.channel_steps = int(steps_of(q));
  p.taps = q.side * q.side, p.chunks_a_tap = int(chunks_of(1, q.channels));
  p.group = GROUP, p.splits = 1;
  map_rows(d.maps.sources, p.rows, q.gradient, bm);
  d.maps.other = map_taps(q.weight, q.gradient.channels, p.taps, q.channels, BK);
  d.copied = q.pre != nullptr;
  if (d.copied) {
    p.sums = q.sums, p.has_second = q.act != nullptr;
    p.added_rows = Rows{0, p.m, p.m, 1};
    d.maps.added = map_matrix(q.pre, p.m, p.n, p.n, bm);
    d.maps.out = map_matrix(q.out, p.m, p.n, p.n, PIECE_ROWS);
    if (q.act) d.maps.second = map_matrix(q.act, p.m, p.n, p.n, PIECE_ROWS);
  } else {
    p.out_tokens = static_cast<uint16_t*>(q.out), p.out_prefix = q.out_prefix;
    p.grid = Image(Tokens{{}, 1, q.gradient.batch, q.height, q.width, 0, 0, q.side, q.channels});
    p.residual_kind = q.residual_kind;
    if (q.residual_kind != Residual::none) p.residual = Image(q.residual_gradient);
  }
  return d;
}

inline Description describe(const WeightGradient& q, int bm, int bn, int splits) {
  Description d{};
  Arguments& p = d.arguments;
  p.m = q.gradient.channels, p.n = q.x.channels, p.columns = int(columns_of(q));
  p.sources_count = q.x.num_sources, p.steps = p.channel_steps = int(steps_of(q));
  p.taps = int(q.x.num_sources * q.x.taps()), p.chunks_a_tap = int(chunks_of(1, q.x.channels));
  p.group = GROUP, p.splits = splits;
  map_rows(&d.maps.other, p.other_rows, q.gradient, BK);
  map_rows(d.maps.sources, p.rows, q.x, BK);
  d.maps.out = map_taps(q.out, p.m, p.taps, q.x.channels, PIECE_ROWS);
  return d;
}

}  // namespace laco
