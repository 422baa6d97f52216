/* c [m, n] fp32 (+)= a [m, k] @ b [k, n], of bf16, fp16 or fp32, with any strides of a and b.
 *
 * a and b are packed to panels of 32-bit lanes, one lane for each row of a or column of b and each step along k.
 * A step is a pair of bf16 (vdpbf16ps) or one fp32, so that all dtypes share everything but the one instruction.
 * An element of c is the sum of its blocks of STEPS steps, in order, each block summed in order from zero: its
 * bits depend neither on the other rows and columns nor on the number of threads.
 */
#include <stdint.h>
#include <stdlib.h>

enum { BF16 = 0, FP16 = 1, FP32 = 2, BF16_WIDENED = 3 };

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

#ifndef STEPS
#define STEPS 512 /* steps of a block */
#endif
#ifndef CHAIN
#define CHAIN 64 /* steps that are summed one after another */
#endif
#define ROWS 8    /* rows and vectors of 16 columns of c that are kept in registers */
#define VECTORS 3
#define WIDTH (16 * VECTORS)
#define INLINE static inline __attribute__((always_inline))

#ifndef TILE_M
#define TILE_M 512
#endif
#ifndef TILE_N
#define TILE_N (21 * WIDTH)
#endif
#define HELD (6 << 18) /* lanes of packed a and b that may be kept over all of k: 6 MB */

#ifdef __AVX512BF16__
#define PAIRS 1
#else
#define PAIRS 0
#endif

typedef int64_t i64;
typedef uint32_t lane;

typedef struct {
  const char *p;
  i64 lanes, k;             /* rows of a or columns of b, and the contracted size */
  i64 lane_stride, k_stride; /* bytes */
  int kind;
} source;

static i64 least(i64 x, i64 y) { return x < y ? x : y; }
static i64 parts(i64 x, i64 y) { return (x + y - 1) / y; }
static int depth(int kind) { return kind == BF16 ? 2 : 1; }
static int bytes(int kind) { return kind == FP32 ? 4 : 2; }

/* ---- packing ---- */

/* `count` <= 16 adjacent lanes (or, along k, steps) of one-element steps; the others are 0. */
INLINE __m512i widened(int kind, const void *p, __mmask16 mask) {
  if (kind == FP32) return _mm512_maskz_loadu_epi32(mask, p);
  __m256i half = _mm256_maskz_loadu_epi16(mask, p);
  if (kind == FP16) return _mm512_castps_si512(_mm512_cvtph_ps(half));
  __m512i bits = _mm512_cvtepu16_epi32(half);
  return kind == BF16 ? bits : _mm512_slli_epi32(bits, 16);
}

/* Step s of 16 adjacent lanes. */
INLINE __m512i across(int kind, const source *x, const char *p, i64 s, __mmask16 mask) {
  if (kind != BF16) return widened(kind, p + s * x->k_stride, mask);
  __m512i first = widened(BF16, p + 2 * s * x->k_stride, mask);
  if (2 * s + 1 == x->k) return first;
  return _mm512_or_si512(first, _mm512_slli_epi32(widened(BF16, p + (2 * s + 1) * x->k_stride, mask), 16));
}

/* Up to 16 steps of one lane whose elements are adjacent along k, `left` elements from its end. */
INLINE __m512i along(int kind, const char *p, i64 left) {
  if (kind == BF16) {
    if (left >= 32) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16(_cvtu32_mask32((1u << left) - 1), p);
  }
  return widened(kind, p, _cvtu32_mask16(left >= 16 ? 0xffff : (1u << left) - 1));
}

INLINE lane one(int kind, const source *x, const char *p, i64 s) {
  if (kind == FP32) return *(const lane *)(p + s * x->k_stride);
  if (kind == FP16) {
    __m128i half = _mm_cvtsi32_si128(*(const uint16_t *)(p + s * x->k_stride));
    return _mm_cvtsi128_si32(_mm_castps_si128(_mm_cvtph_ps(half)));
  }
  if (kind == BF16_WIDENED) return (lane)*(const uint16_t *)(p + s * x->k_stride) << 16;
  lane first = *(const uint16_t *)(p + 2 * s * x->k_stride);
  if (2 * s + 1 == x->k) return first;
  return first | (lane)*(const uint16_t *)(p + (2 * s + 1) * x->k_stride) << 16;
}

INLINE void transpose16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

/* Where a group of 16 lanes goes: two halves, since a panel of a is 8 lanes wide and one of b 48. */
typedef struct { lane *low, *high; i64 step; } place;

INLINE place place_of(lane *to, i64 group, i64 panel, int width) {
  if (width == ROWS) return (place){to + 2 * group * panel, to + (2 * group + 1) * panel, ROWS};
  lane *low = to + group / VECTORS * panel + group % VECTORS * 16;
  return (place){low, low + 8, WIDTH};
}

INLINE void put(place at, i64 step, __m512i value) {
  _mm256_storeu_si256((__m256i *)(at.low + step * at.step), _mm512_castsi512_si256(value));
  _mm256_storeu_si256((__m256i *)(at.high + step * at.step), _mm512_extracti64x4_epi64(value, 1));
}

/* Lanes [first, first + lanes) and steps [from, from + steps) of x to panels of `width` lanes. */
INLINE void pack_kind(int kind, int width, lane *to, i64 panel, const source *x, i64 first, i64 lanes, i64 from,
                      i64 steps) {
  const char *base = x->p + first * x->lane_stride;
  i64 groups = parts(lanes, 16);
  if (x->lane_stride == bytes(kind)) {
    for (i64 s = 0; s < steps; s++)
      for (i64 g = 0; g < groups; g++) {
        i64 left = lanes - 16 * g;
        __mmask16 mask = _cvtu32_mask16(left >= 16 ? 0xffff : (1u << left) - 1);
        const char *p = base + 16 * g * x->lane_stride;
        put(place_of(to, g, panel, width), s, across(kind, x, p, from + s, mask));
      }
    return;
  }
  for (i64 g = 0; g < groups; g++) {
    i64 left = least(16, lanes - 16 * g);
    const char *p = base + 16 * g * x->lane_stride;
    place at = place_of(to, g, panel, width);
    for (i64 s = 0; s < steps; s += 16) {
      __m512i r[16];
      if (x->k_stride == bytes(kind)) {
        i64 element = (from + s) * depth(kind);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
          r[i] = i < left ? along(kind, p + i * x->lane_stride + element * bytes(kind), x->k - element)
                          : _mm512_setzero_si512();
        transpose16(r);
      } else {
        lane square[16][16] = {{0}};
        for (i64 j = 0; j < least(16, steps - s); j++)
          for (i64 i = 0; i < left; i++) square[j][i] = one(kind, x, p + i * x->lane_stride, from + s + j);
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) r[j] = _mm512_loadu_si512(square[j]);
      }
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++)
        if (s + j < steps) put(at, s + j, r[j]);
    }
  }
}

#define PACK(name, width)                                                                                     \
  static void name(lane *to, i64 panel, const source *x, i64 first, i64 lanes, i64 from, i64 steps) {          \
    switch (x->kind) {                                                                                        \
    case BF16: pack_kind(BF16, width, to, panel, x, first, lanes, from, steps); break;                         \
    case FP16: pack_kind(FP16, width, to, panel, x, first, lanes, from, steps); break;                         \
    case FP32: pack_kind(FP32, width, to, panel, x, first, lanes, from, steps); break;                         \
    default: pack_kind(BF16_WIDENED, width, to, panel, x, first, lanes, from, steps);                          \
    }                                                                                                         \
  }
PACK(pack_a, ROWS)
PACK(pack_b, WIDTH)

/* ---- product ---- */

INLINE __m512 dot(int paired, __m512 sum, lane a, __m512i b) {
  __m512i all = _mm512_set1_epi32((int)a);
#if PAIRS
  if (paired) return _mm512_dpbf16_ps(sum, (__m512bh)all, (__m512bh)b);
#endif
  return _mm512_fmadd_ps(_mm512_castsi512_ps(all), _mm512_castsi512_ps(b), sum);
}

/* One tile of c: `rows` x (16 * vectors), the last vector masked. add: to what c holds. */
INLINE void tile(int paired, int rows, int vectors, const lane *a, const lane *b, i64 steps, float *c, i64 c_stride,
                 __mmask16 last, int add) {
  float total[ROWS][WIDTH] __attribute__((aligned(64)));
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) {
      _mm_prefetch((const char *)(c + i * c_stride + 16 * v), _MM_HINT_T0);
      _mm512_store_ps(&total[i][16 * v], _mm512_setzero_ps());
    }
  }
  for (i64 from = 0; from < steps; from += CHAIN) {
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 3
      for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
    }
    for (i64 s = least(CHAIN, steps - from); s; s--, a += ROWS, b += WIDTH) {
      __m512i row[VECTORS];
#pragma GCC unroll 3
      for (int v = 0; v < vectors; v++) row[v] = _mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) {
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[i][v] = dot(paired, sum[i][v], a[i], row[v]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 3
      for (int v = 0; v < vectors; v++) {
        float *at = &total[i][16 * v];
        _mm512_store_ps(at, _mm512_add_ps(sum[i][v], _mm512_load_ps(at)));
      }
    }
  }
  for (int i = 0; i < rows; i++) {
    for (int v = 0; v < vectors; v++) {
      float *at = c + i * c_stride + 16 * v;
      __mmask16 mask = v == vectors - 1 ? last : (__mmask16)-1;
      __m512 all = _mm512_load_ps(&total[i][16 * v]);
      if (add) all = _mm512_add_ps(all, _mm512_maskz_loadu_ps(mask, at));
      _mm512_mask_storeu_ps(at, mask, all);
    }
  }
}

#define CASE(rows, vectors)                                                                                   \
  case (rows) * VECTORS + (vectors)-1: tile(paired, rows, vectors, a, b, steps, c, c_stride, last, add); break;
#define CASES(rows) CASE(rows, 1) CASE(rows, 2) CASE(rows, 3)

INLINE void any_tile(int paired, i64 rows, i64 columns, const lane *a, const lane *b, i64 steps, float *c, i64 c_stride,
                     int add) {
  i64 vectors = parts(columns, 16);
  __mmask16 last = _cvtu32_mask16(0xffffu >> (16 * vectors - columns));
  switch (rows * VECTORS + vectors - 1) { CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) CASES(6) CASES(7) CASES(8) }
}

static void paired_tile(i64 rows, i64 columns, const lane *a, const lane *b, i64 steps, float *c, i64 c_stride, int add) {
  any_tile(1, rows, columns, a, b, steps, c, c_stride, add);
}
static void single_tile(i64 rows, i64 columns, const lane *a, const lane *b, i64 steps, float *c, i64 c_stride, int add) {
  any_tile(0, rows, columns, a, b, steps, c, c_stride, add);
}

/* c [rows, columns] (+)= one block of packed a times one of packed b. A panel of b is used for all rows at once. */
static void block(int kind, i64 rows, i64 columns, const lane *a, i64 a_panel, const lane *b, i64 b_panel, i64 steps,
                  float *c, i64 c_stride, int add) {
  for (i64 j = 0; j < columns; j += WIDTH)
    for (i64 i = 0; i < rows; i += ROWS)
      (kind == BF16 ? paired_tile : single_tile)(least(ROWS, rows - i), least(WIDTH, columns - j), a + i / ROWS * a_panel,
                                                 b + j / WIDTH * b_panel, steps, c + i * c_stride + j, c_stride, add);
}

#define A_PANEL (STEPS * ROWS + 16) /* not a power of two: stores to many panels would share few cache sets */
#define B_PANEL (STEPS * WIDTH + 16)

typedef struct { source a, b; float *c; i64 c_stride, tile_m, tile_n; int add; } product;

/* One tile of the grid. Packed operands stay from tile to tile when there is room for all of k (`*_held`). */
static void grid_tile(const product *x, i64 i, i64 j, lane *pa, lane *pb, i64 a_size, i64 b_size, i64 *a_held, i64 *b_held) {
  i64 rows = least(x->tile_m, x->a.lanes - i), columns = least(x->tile_n, x->b.lanes - j);
  i64 steps = parts(x->a.k, depth(x->a.kind));
  for (i64 from = 0, n = 0; from < steps; from += STEPS, n++) {
    i64 count = least(STEPS, steps - from);
    lane *a = pa + n * a_size, *b = pb + n * b_size;
    if (*a_held != i) pack_a(a, A_PANEL, &x->a, i, rows, from, count);
    if (*b_held != j) pack_b(b, B_PANEL, &x->b, j, columns, from, count);
    block(x->a.kind, rows, columns, a, A_PANEL, b, B_PANEL, count, x->c + i * x->c_stride + j, x->c_stride, x->add || n);
  }
  if (a_size) *a_held = i;
  if (b_size) *b_held = j;
}

/* Takes tiles of the grid from the shared counter until none is left. */
static int work(const product *x, i64 *next) {
  i64 blocks = parts(parts(x->a.k, depth(x->a.kind)), STEPS);
  i64 a_size = parts(x->tile_m, 16) * 2 * A_PANEL, b_size = parts(x->tile_n, WIDTH) * B_PANEL;
  int hold = blocks * (a_size + b_size) <= HELD;
  i64 copies = hold ? blocks : 1;
  lane *memory = malloc((copies * (a_size + b_size) + 16) * sizeof(lane));
  if (!memory) return -1;
  lane *pa = (lane *)(((uintptr_t)memory + 63) & ~(uintptr_t)63), *pb = pa + copies * a_size;
  i64 a_held = -1, b_held = -1, across = parts(x->b.lanes, x->tile_n), tiles = across * parts(x->a.lanes, x->tile_m);
  for (i64 t; (t = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < tiles;)
    grid_tile(x, t / across * x->tile_m, t % across * x->tile_n, pa, pb, hold ? a_size : 0, hold ? b_size : 0, &a_held,
              &b_held);
  free(memory);
  return 0;
}

/* Even shares: as many tiles as a multiple of `threads`, of at most TILE_M x TILE_N. */
static void cut(product *x, i64 threads) {
  i64 m = x->a.lanes, n = x->b.lanes, down = parts(m, TILE_M), across = parts(n, TILE_N);
  if (down * across % threads) {
    if (n >= m) across = parts(across, threads) * threads;
    else down = parts(down, threads) * threads;
  }
  x->tile_m = parts(parts(m, down), 16) * 16;
  x->tile_n = parts(parts(n, across), WIDTH) * WIDTH;
}

int raise_gemm(int kind, const void *a, const void *b, float *c, i64 m, i64 n, i64 k, i64 a_m, i64 a_k, i64 b_k, i64 b_n,
               i64 c_m, int add, i64 threads, i64 *next) {
  if (kind == BF16 && !PAIRS) kind = BF16_WIDENED;
  i64 size = bytes(kind);
  product x = {{a, m, k, a_m * size, a_k * size, kind}, {b, n, k, b_n * size, b_k * size, kind}, c, c_m, 0, 0, add};
  cut(&x, threads);
  return work(&x, next);
}

/* 0: there is no kernel for this processor. 1: of all dtypes. 2: and bf16 has its own instruction. */
int raise_gemm_level(void) { return 1 + PAIRS; }

#else
int raise_gemm_level(void) { return 0; }
#endif
