/* c [m, n] fp32 (+)= a [m, k] @ b [k, n], of bf16, fp16 or fp32, with any strides of a and b.
 * a and b are packed to panels of 32-bit lanes: a lane for each row of a or column of b, at each step of k.
 * A step is a pair of bf16 (vdpbf16ps) or one fp32; beyond loading and that instruction the dtypes share all.
 * An element of c is the sum of blocks of STEPS steps, a block the sum of chains of CHAIN steps, in order
 * and each from zero: its bits depend neither on other rows and columns nor on the number of threads.
 * Short chains round less than long ones. */
#include <stdint.h>
#include <stdlib.h>

enum { BF16 = 0, FP16 = 1, FP32 = 2, BF16_WIDENED = 3 };

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

#include "threads.h"

#define STEPS 512 /* a multiple of CHAIN and of 16 */
#define CHAIN 64
#define ROWS 8 /* of c, and vectors of 16 columns, that are kept in registers */
#define VECTORS 3
#define WIDTH (16 * VECTORS)
#define STRIP (4 * WIDTH) /* columns of b packed at one time: 384 KB, to stay in the second-level cache */
#define TILE_M 512        /* a thread takes tiles of c of at most this size */
#define TILE_N (6 * STRIP)
#define HELD (3 << 18) /* lanes of packed a, and of packed b, that may be kept over all of k: 3 MB each */
#define AHEAD 8        /* steps that rows of adjacent lanes are fetched before they are packed */
#define A_PANEL (STEPS * ROWS + 16) /* not a power of two, so that panels do not share a few cache sets */
#define B_PANEL (STEPS * WIDTH + 16)
#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512BF16__
#define PAIRS 1
#else
#define PAIRS 0
#endif

typedef int64_t i64;
typedef uint32_t lane;

typedef struct {
  const char *p;
  i64 lanes, k;              /* rows of a or columns of b, and the contracted size */
  i64 lane_stride, k_stride; /* bytes */
  int kind;
} source;

static i64 least(i64 x, i64 y) { return x < y ? x : y; }
static i64 parts(i64 x, i64 y) { return (x + y - 1) / y; }
static int depth(int kind) { return kind == BF16 ? 2 : 1; }
static int bytes(int kind) { return kind == FP32 ? 4 : 2; }

/* The first `count` of 16. */
static __mmask16 first_of(i64 count) { return _cvtu32_mask16(count >= 16 ? 0xffff : (1u << count) - 1); }

/* 16 adjacent elements, a lane each: those in the mask, else 0. A BF16 goes to the low half of its lane. */
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

/* 16 steps of a lane whose elements are adjacent along k; 0 from `left` elements on. */
INLINE __m512i along(int kind, const char *p, i64 left) {
  if (kind == BF16) {
    if (left >= 32) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16(_cvtu32_mask32((1u << left) - 1), p);
  }
  return widened(kind, p, first_of(left));
}

/* Step s of one lane. */
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

static __attribute__((noinline)) void transpose16(__m512i r[16], lane to[16][16]) {
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
    _mm512_store_si512(to[i], _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_store_si512(to[i + 8], _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
}

/* Where a group of 16 lanes goes: two halves, since a panel of a is 8 lanes wide and one of b 48. */
typedef struct {
  lane *low, *high;
} place;

INLINE place place_of(int width, lane *to, i64 group) {
  if (width == ROWS) return (place){to + 2 * group * A_PANEL, to + (2 * group + 1) * A_PANEL};
  lane *low = to + group / VECTORS * B_PANEL + group % VECTORS * 16;
  return (place){low, low + 8};
}

INLINE void put(int width, place at, i64 step, __m512i value) {
  if (width == WIDTH) {
    _mm512_store_si512(at.low + step * WIDTH, value);
    return;
  }
  _mm256_store_si256((__m256i *)(at.low + step * ROWS), _mm512_castsi512_si256(value));
  _mm256_store_si256((__m256i *)(at.high + step * ROWS), _mm512_extracti64x4_epi64(value, 1));
}

/* Lanes from x->p on that are adjacent in memory: row after row of it, over all panels. */
INLINE void pack_across(int kind, int width, lane *to, const source *x, const char *p, i64 lanes, i64 from,
                        i64 steps) {
  for (i64 s = 0; s < steps; s++)
    for (i64 l = 0; l < lanes; l += 16) {
      const char *at = p + l * bytes(kind);
      for (int d = 0; d < depth(kind); d++)
        _mm_prefetch(at + ((from + s + AHEAD) * depth(kind) + d) * x->k_stride, _MM_HINT_T0);
      put(width, place_of(width, to, l / 16), s, across(kind, x, at, from + s, first_of(lanes - l)));
    }
}

/* 16 steps of up to 16 lanes that are not adjacent in memory. */
INLINE void square(int kind, const source *x, const char *p, i64 lanes, i64 from, i64 steps,
                   lane to[16][16]) {
  if (x->k_stride != bytes(kind)) {
    for (i64 j = 0; j < least(16, steps); j++)
      for (i64 i = 0; i < 16; i++) to[j][i] = i < lanes ? one(kind, x, p + i * x->lane_stride, from + j) : 0;
    return;
  }
  __m512i r[16];
  i64 element = from * depth(kind);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    const char *at = p + i * x->lane_stride + element * bytes(kind);
    _mm_prefetch(at + 16 * x->lane_stride, _MM_HINT_T1); /* of the lanes that are packed next */
    r[i] = i < lanes ? along(kind, at, x->k - element) : _mm512_setzero_si512();
  }
  transpose16(r, to);
}

/* Lanes [first, first + lanes) and steps [from, from + steps) of x to panels. */
INLINE void pack_kind(int kind, int width, lane *to, const source *x, i64 first, i64 lanes, i64 from,
                      i64 steps) {
  const char *p = x->p + first * x->lane_stride;
  if (x->lane_stride == bytes(kind)) {
    pack_across(kind, width, to, x, p, lanes, from, steps);
    return;
  }
  for (i64 l = 0; l < lanes; l += 16)
    for (i64 s = 0; s < steps; s += 16) {
      lane both[16][16] __attribute__((aligned(64)));
      square(kind, x, p + l * x->lane_stride, least(16, lanes - l), from + s, steps - s, both);
      for (i64 j = 0; j < least(16, steps - s); j++)
        put(width, place_of(width, to, l / 16), s + j, _mm512_load_si512(both[j]));
    }
}

#define PACK(name, width)                                                                       \
  static void name(lane *to, const source *x, i64 first, i64 lanes, i64 from, i64 steps) {      \
    switch (x->kind) {                                                                          \
    case BF16: pack_kind(BF16, width, to, x, first, lanes, from, steps); break;                 \
    case FP16: pack_kind(FP16, width, to, x, first, lanes, from, steps); break;                 \
    case FP32: pack_kind(FP32, width, to, x, first, lanes, from, steps); break;                 \
    default: pack_kind(BF16_WIDENED, width, to, x, first, lanes, from, steps);                  \
    }                                                                                           \
  }
PACK(pack_a, ROWS)
PACK(pack_b, WIDTH)

INLINE __m512 dot(int paired, __m512 sum, lane a, __m512i b) {
  __m512i all = _mm512_set1_epi32((int)a);
#if PAIRS
  if (paired) return _mm512_dpbf16_ps(sum, (__m512bh)all, (__m512bh)b);
#else
  (void)paired;
#endif
  return _mm512_fmadd_ps(_mm512_castsi512_ps(all), _mm512_castsi512_ps(b), sum);
}

/* What one tile of c reads and writes; a and b are panels, add: to what c holds. */
typedef struct {
  const lane *a, *b;
  char *c;
  i64 steps, c_stride; /* bytes */
  int add, narrow;     /* narrow: c is bf16, and all of k is in this task */
} task;

static i64 item(int narrow) { return narrow ? 2 : 4; }

/* A sum, or what is there and a sum, rounded once to bf16. */
INLINE void store_narrow(char *at, __mmask16 mask, __m512 sum, int add) {
#if PAIRS
  if (add) {
    __m512i there = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(there, 16)));
  }
  _mm256_mask_storeu_epi16(at, mask, (__m256i)_mm512_cvtneps_pbh(sum));
#else
  (void)at, (void)mask, (void)sum, (void)add;
#endif
}

/* The first `stored` of `rows` rows, and `vectors` vectors of 16 columns, the last one masked. */
INLINE void tile(int paired, int rows, int vectors, task x, i64 stored, __mmask16 last) {
  float total[ROWS][WIDTH] __attribute__((aligned(64)));
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) {
      if (i < stored) _mm_prefetch(x.c + i * x.c_stride + 16 * v * item(x.narrow), _MM_HINT_T0);
      _mm512_store_ps(&total[i][16 * v], _mm512_setzero_ps());
    }
  }
  for (i64 from = 0; from < x.steps; from += CHAIN) {
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 3
      for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
    }
    for (i64 s = least(CHAIN, x.steps - from); s; s--, x.a += ROWS, x.b += WIDTH) {
      __m512i row[VECTORS];
#pragma GCC unroll 3
      for (int v = 0; v < vectors; v++) row[v] = _mm512_loadu_si512(x.b + 16 * v);
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) {
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[i][v] = dot(paired, sum[i][v], x.a[i], row[v]);
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
  for (int i = 0; i < stored; i++) {
    for (int v = 0; v < vectors; v++) {
      char *at = x.c + i * x.c_stride + 16 * v * item(x.narrow);
      __mmask16 mask = v == vectors - 1 ? last : first_of(16);
      __m512 all = _mm512_load_ps(&total[i][16 * v]);
      if (x.narrow) {
        store_narrow(at, mask, all, x.add);
        continue;
      }
      if (x.add) all = _mm512_add_ps(all, _mm512_maskz_loadu_ps(mask, at));
      _mm512_mask_storeu_ps(at, mask, all);
    }
  }
}

#define CASE(rows, vectors) \
  case (rows)*VECTORS + (vectors): tile(paired, rows, vectors, x, stored, last); break;
#define CASES(rows) CASE(rows, 1) CASE(rows, 2) CASE(rows, 3)

INLINE void any_tile(int paired, i64 stored, i64 columns, task x) {
  i64 vectors = parts(columns, 16);
  __mmask16 last = first_of(columns - 16 * (vectors - 1));
  i64 rows = stored > 4 ? 8 : stored > 2 ? 4 : stored;
  switch (rows * VECTORS + vectors) {
    CASES(1) CASES(2) CASES(4) CASES(8)
  }
}

static void paired_tile(i64 rows, i64 columns, task x) { any_tile(1, rows, columns, x); }
static void single_tile(i64 rows, i64 columns, task x) { any_tile(0, rows, columns, x); }

/* c [rows, columns] (+)= one block of packed a times one of packed b. */
static void block(int kind, i64 rows, i64 columns, task x) {
  for (i64 j = 0; j < columns; j += WIDTH)
    for (i64 i = 0; i < rows; i += ROWS) {
      const lane *a = x.a + i / ROWS * A_PANEL, *b = x.b + j / WIDTH * B_PANEL;
      char *c = x.c + i * x.c_stride + j * item(x.narrow);
      task one = {a, b, c, x.steps, x.c_stride, x.add, x.narrow};
      (kind == BF16 ? paired_tile : single_tile)(least(ROWS, rows - i), least(WIDTH, columns - j), one);
    }
}

typedef struct {
  source a, b;
  char *c;
  i64 c_stride, tile_m, tile_n;
  int add, narrow;
  i64 next, working; /* shared by the threads: the tile to take, and how many threads had memory */
} product;

typedef struct {
  lane *a, *b;
  i64 a_block, b_block; /* lanes from one packed block of k to the next, 0: it is not kept */
  i64 a_held, b_held;   /* the row and column whose packed tile is there */
} scratch;

/* One tile of the grid, a strip of b at a time, which is used for all rows while it is in the cache.
 * Packed operands stay from tile to tile (`*_held`) where there is room for all of k. */
static void grid_tile(const product *x, i64 i, i64 j, scratch *s) {
  i64 rows = least(x->tile_m, x->a.lanes - i), columns = least(x->tile_n, x->b.lanes - j);
  i64 steps = parts(x->a.k, depth(x->a.kind));
  for (i64 from = 0, n = 0; from < steps; from += STEPS, n++) {
    i64 count = least(STEPS, steps - from);
    lane *a = s->a + n * s->a_block;
    if (s->a_held != i) pack_a(a, &x->a, i, rows, from, count);
    for (i64 l = 0; l < columns; l += STRIP) {
      lane *b = s->b + n * s->b_block + (s->b_block ? l / WIDTH * B_PANEL : 0);
      i64 width = least(STRIP, columns - l);
      if (s->b_held != j) pack_b(b, &x->b, j + l, width, from, count);
      char *c = x->c + i * x->c_stride + (j + l) * item(x->narrow);
      task one = {a, b, c, count, x->c_stride, x->add || n, x->narrow};
      block(x->a.kind, rows, width, one);
    }
  }
  if (s->a_block) s->a_held = i;
  if (s->b_block) s->b_held = j;
}

/* Takes tiles of the grid until none is left. */
static void work(void *shared) {
  product *x = shared;
  i64 blocks = parts(parts(x->a.k, depth(x->a.kind)), STEPS);
  i64 a_size = parts(x->tile_m, 16) * 2 * A_PANEL, b_size = parts(x->tile_n, WIDTH) * B_PANEL;
  int hold_a = blocks * a_size <= HELD, hold_b = blocks * b_size <= HELD && x->tile_n >= x->b.lanes;
  if (hold_a) a_size *= blocks;
  b_size = hold_b ? b_size * blocks : STRIP / WIDTH * B_PANEL;
  lane *memory = malloc((a_size + b_size + 16) * sizeof(lane));
  if (!memory) return;
  __atomic_fetch_add(&x->working, 1, __ATOMIC_RELAXED);
  scratch s = {(lane *)(((uintptr_t)memory + 63) & ~(uintptr_t)63), 0, hold_a ? a_size / blocks : 0,
               hold_b ? b_size / blocks : 0, -1, -1};
  s.b = s.a + a_size;
  i64 across = parts(x->b.lanes, x->tile_n), tiles = across * parts(x->a.lanes, x->tile_m);
  for (i64 t; (t = __atomic_fetch_add(&x->next, 1, __ATOMIC_RELAXED)) < tiles;)
    grid_tile(x, t / across * x->tile_m, t % across * x->tile_n, &s);
  free(memory);
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

/* Strides in elements; those of c along n are 1. narrow: c is bf16, for BF16 with at most 2 STEPS of k alone.
 * Returns 0, or -1: no thread had memory. */
int raise_gemm(int kind, const void *a, const void *b, void *c, i64 m, i64 n, i64 k, i64 a_m, i64 a_k,
               i64 b_k, i64 b_n, i64 c_m, int add, int narrow, i64 threads) {
  if (kind == BF16 && !PAIRS) kind = BF16_WIDENED;
  i64 size = bytes(kind);
  source from_a = {a, m, k, a_m * size, a_k * size, kind}, from_b = {b, n, k, b_n * size, b_k * size, kind};
  product x = {from_a, from_b, c, c_m * item(narrow), 0, 0, add, narrow, 0, 0};
  cut(&x, threads);
  run_on_threads(work, &x, threads);
  return x.working ? 0 : -1;
}

/* 0: there is no kernel for this processor. 1: of all dtypes. 2: and bf16 has its own instruction. */
int raise_gemm_level(void) { return 1 + PAIRS; }

#else
int raise_gemm_level(void) { return 0; }
#endif
