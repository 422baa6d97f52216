/* Statistics of softmax(z) of rows of logits, and their gradient. One read of each logit from memory.
 *
 * One thread takes a row from its first column to its last, in blocks that stay in the nearest cache. A block
 * gives sums around the largest z so far, lane by lane; they are joined in double precision, block after
 * block. So the bits of a row depend neither on other rows nor on the number of threads.
 *
 *     m = max z   s0 = sum e   s1 = sum e*d   m2 = sum e*(d - s1/s0)^2   sd = sum d   n = columns with z > -inf
 *
 * with d = z - m and e = exp(d). The Python side is raise_kernels/native_compiled.py, which mirrors `Job`. */

#include "threads.h"
#include "vector_math.h"

#define BLOCK 2048 /* columns; three such blocks of floats leave room in a 32 KiB cache */

enum { FP32, BF16, FP16 };
enum { LOGP, LSE, ENTROPY, SELF_CERTAINTY, MAX_LOGP, VARENTROPY, RANK, TOP, COUNT, FIELDS };

typedef struct {
    const void *x;          /* logits through their strides; adjacent columns */
    int64_t dtype;          /* FP32, BF16 or FP16 */
    int64_t axes;           /* leading axes, with sizes and strides (elements) */
    const int64_t *sizes, *strides;
    int64_t rows, columns, all_columns; /* columns: those of the vocabulary */
    int64_t tokens;
    const int64_t *y, *row_of; /* [tokens]; row_of may be NULL: token t scores row t */
    int64_t ignored;
    double a, b;            /* z = a x, or b tanh(a x) where capped */
    int64_t capped, level, ranked;
    float *out[FIELDS];     /* [tokens] each, or NULL where not wanted */
    const float *top, *max_logp, *on_p, *on_p_logp, *everywhere, *on_target; /* [tokens] */
    void *grad;             /* [rows, all_columns]; x itself will do, each block of a row is read before */
    int64_t grad_dtype;
    int64_t *first, *next;  /* [rows], [tokens]: the tokens of a row as a list */
    int64_t units, grain, cursor; /* what threads take: tokens or rows, so many at a time */
} Job;

INLINE int64_t item_size(const Job *job)
{
    return job->dtype == FP32 ? 4 : 2;
}

static const char *row_start(const Job *job, int64_t n)
{
    int64_t offset = 0;
    for (int64_t k = job->axes - 1; k >= 0; k--) {
        offset += n % job->sizes[k] * job->strides[k];
        n /= job->sizes[k];
    }
    return (const char *)job->x + offset * item_size(job);
}

INLINE int64_t padded(int64_t count)
{
    return (count + LANES - 1) / LANES * LANES;
}

static void cap(float *z, int64_t count, float a, float b)
{
    for (int64_t j = 0; j < count; j += LANES)
        for (int i = 0; i < LANES; i++) {
            float x = z[j + i];
            float capped = b * fast_tanh(a * x);
            z[j + i] = x == -INFINITY ? x : capped;
        }
}

/* z of `count` columns from `start`, filled up with -inf to whole lanes: in `buffer`, or where it lies. */
static const float *load(const Job *job, const char *row, int64_t start, int64_t count, float *buffer)
{
    int64_t whole = padded(count);
    float a = (float)job->a;
    if (job->dtype == FP32) {
        const float *x = (const float *)row + start;
        if (whole == count && a == 1.0f && !job->capped)
            return x;
        memcpy(buffer, x, count * sizeof *x);
    } else {
        const uint16_t *x = (const uint16_t *)row + start;
        if (job->dtype == BF16)
            for (int64_t j = 0; j < count; j++)
                buffer[j] = from_bf16(x[j]);
        else
            for (int64_t j = 0; j < count; j++)
                buffer[j] = from_f16(x[j]);
    }
    for (int64_t j = count; j < whole; j++)
        buffer[j] = -INFINITY;
    if (job->capped)
        cap(buffer, whole, a, (float)job->b);
    else if (a != 1.0f)
        for (int64_t j = 0; j < whole; j++)
            buffer[j] *= a;
    return buffer;
}

/* The largest number, -inf where there is none. */
static float largest(const float *z, int64_t count)
{
    float lane[LANES];
    for (int i = 0; i < LANES; i++)
        lane[i] = -INFINITY;
    for (int64_t j = 0; j < count; j += LANES)
        for (int i = 0; i < LANES; i++)
            lane[i] = z[j + i] > lane[i] ? z[j + i] : lane[i];
    for (int w = LANES / 2; w; w /= 2)
        for (int i = 0; i < w; i++)
            lane[i] = lane[i + w] > lane[i] ? lane[i + w] : lane[i];
    return lane[0];
}

static double total(const float *lane)
{
    double wide[LANES];
    for (int i = 0; i < LANES; i++)
        wide[i] = lane[i];
    for (int w = LANES / 2; w; w /= 2)
        for (int i = 0; i < w; i++)
            wide[i] += wide[i + w];
    return wide[0];
}

typedef struct {
    double m, s0, s1, m2, sd, n;
} Piece;

/* Sums of a block around m (any number where all of it is masked). `ahead`: what will be read next. */
INLINE Piece sums(const float *z, int64_t count, float m, const char *ahead, int64_t item, int level)
{
    float s0[LANES] = {0}, s1[LANES] = {0}, m2[LANES] = {0}, sd[LANES] = {0}, n[LANES] = {0};
    float e_kept[BLOCK], d_kept[BLOCK];
    for (int64_t j = 0; j < count; j += LANES) {
        for (int64_t line = 0; line < LANES * item; line += 64)
            __builtin_prefetch(ahead + j * item + line);
        for (int i = 0; i < LANES; i++) {
            float x = z[j + i], d = x - m, e = fast_exp(d);
            s0[i] += e;
            if (level >= 1) {
                /* Where e is 0, d may be infinite. */
                float near = keep(!(d < EXP_LOWEST), d);
                s1[i] += e * near;
                sd[i] += keep(x != -INFINITY, d);
                n[i] += keep(x != -INFINITY, 1.0f);
                if (level >= 2) {
                    e_kept[j + i] = e;
                    d_kept[j + i] = near;
                }
            }
        }
    }
    Piece piece = {m, total(s0), total(s1), 0, total(sd), total(n)};
    if (level >= 2 && piece.s0 > 0) {
        float mean = (float)(piece.s1 / piece.s0);
        for (int64_t j = 0; j < count; j += LANES)
            for (int i = 0; i < LANES; i++) {
                float gap = d_kept[j + i] - mean;
                m2[i] += e_kept[j + i] * gap * gap;
            }
        piece.m2 = total(m2);
    }
    return piece;
}

static Piece sums_0(const float *z, int64_t count, float m, const char *ahead, int64_t item)
{
    return sums(z, count, m, ahead, item, 0);
}

static Piece sums_1(const float *z, int64_t count, float m, const char *ahead, int64_t item)
{
    return sums(z, count, m, ahead, item, 1);
}

static Piece sums_2(const float *z, int64_t count, float m, const char *ahead, int64_t item)
{
    return sums(z, count, m, ahead, item, 2);
}

/* The numbers above, put around b's maximum, which is at least a's, and added to b's. */
static void join(Piece *a, const Piece *b)
{
    double shift = a->m == -INFINITY ? 0.0 : a->m - b->m;
    if (shift != 0.0) {
        double w = exp(shift);
        a->s1 = w == 0.0 ? 0.0 : w * (a->s1 + shift * a->s0);
        a->s0 *= w;
        a->m2 *= w;
        a->sd += a->n * shift;
    }
    if (a->s0 > 0 && b->s0 > 0) {
        /* Squared deviations of two pieces (Chan, Golub, LeVeque). */
        double gap = a->s1 / a->s0 - b->s1 / b->s0;
        a->m2 += b->m2 + gap * gap * (a->s0 / (a->s0 + b->s0)) * b->s0;
    } else {
        a->m2 += b->m2;
    }
    a->m = b->m;
    a->s0 += b->s0;
    a->s1 += b->s1;
    a->sd += b->sd;
    a->n += b->n;
}

static int64_t above(const float *z, int64_t count, float limit)
{
    int32_t lane[LANES] = {0};
    for (int64_t j = 0; j < count; j += LANES)
        for (int i = 0; i < LANES; i++)
            lane[i] += z[j + i] > limit;
    int64_t sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += lane[i];
    return sum;
}

static void put(const Job *job, int64_t t, int field, double value)
{
    if (job->out[field])
        job->out[field][t] = (float)value;
}

static void score(const Job *job, int64_t t)
{
    int64_t n = job->row_of ? job->row_of[t] : t, y = job->y[t], rank = 0;
    int known = n >= 0 && n < job->rows && y >= 0 && y < job->columns;
    if (y == job->ignored || !known) {
        for (int field = 0; field < FIELDS; field++)
            put(job, t, field, y == job->ignored ? 0.0 : NAN);
        return;
    }
    float buffer[BLOCK];
    const char *row = row_start(job, n);
    int64_t item = item_size(job), at = y / LANES * LANES;
    int64_t nearby = job->columns - at < LANES ? job->columns - at : LANES;
    float z_y = load(job, row, at, nearby, buffer)[y - at];
    Piece all = {-INFINITY, 0, 0, 0, 0, 0};
    for (int64_t start = 0; start < job->columns; start += BLOCK) {
        int64_t count = job->columns - start < BLOCK ? job->columns - start : BLOCK;
        const float *z = load(job, row, start, count, buffer);
        const char *ahead = row + (start + BLOCK) * item;
        count = padded(count);
        float m = largest(z, count);
        m = m > all.m ? m : (float)all.m;
        /* With nothing but masked columns so far, inf - inf would not be a number. */
        float base = m == -INFINITY ? 0.0f : m;
        Piece piece = job->level == 0   ? sums_0(z, count, base, ahead, item)
                      : job->level == 1 ? sums_1(z, count, base, ahead, item)
                                        : sums_2(z, count, base, ahead, item);
        piece.m = m;
        join(&all, &piece);
        if (job->ranked)
            rank += above(z, count, z_y);
    }
    int bad = !(all.s0 > 0); /* NaN, +inf, or no unmasked column */
    double log_s = log(all.s0), value[FIELDS] = {0};
    value[LOGP] = z_y - all.m - log_s;
    value[LSE] = all.m + log_s;
    value[MAX_LOGP] = -log_s;
    value[TOP] = all.m;
    value[RANK] = (double)rank;
    value[ENTROPY] = log_s - all.s1 / all.s0;
    value[SELF_CERTAINTY] = log_s - all.sd / all.n - log(all.n);
    value[VARENTROPY] = all.m2 / all.s0;
    value[COUNT] = all.n;
    for (int field = 0; field < FIELDS; field++) {
        /* A row without an unmasked column has no statistics, but as a part of a longer row it has a top. */
        int kept = !bad || (field == TOP && all.s0 == 0);
        put(job, t, field, kept ? value[field] : NAN);
    }
}

/* dz += p (A + B log p) + C of one token. */
static void add_token(const Job *job, int64_t t, const float *z, int64_t count, float *dz)
{
    float top = job->top[t], max_logp = job->max_logp[t];
    float on_p = job->on_p[t], on_p_logp = job->on_p_logp[t], everywhere = job->everywhere[t];
    for (int64_t j = 0; j < count; j += LANES)
        for (int i = 0; i < LANES; i++) {
            /* lse in two parts: rounded to one number it would cost p its precision. */
            float log_p = (z[j + i] - top) + max_logp;
            float near = keep(!(log_p < EXP_LOWEST), log_p);
            dz[j + i] += fast_exp(log_p) * (on_p + on_p_logp * near) + everywhere;
        }
}

/* dz/dx, and 0 for masked columns. */
static void to_dx(const Job *job, const float *z, int64_t count, float *dz)
{
    float slope = (float)(job->capped ? job->a * job->b : job->a), b = (float)job->b;
    int capped = job->capped != 0;
    for (int64_t j = 0; j < count; j += LANES)
        for (int i = 0; i < LANES; i++) {
            float bent = capped ? z[j + i] / b : 0.0f;
            float dx = dz[j + i] * (slope * (1.0f - bent * bent));
            dz[j + i] = keep(z[j + i] != -INFINITY, dx);
        }
}

static void store(const Job *job, char *into, const float *dz, int64_t count)
{
    if (job->grad_dtype == FP32)
        memcpy(into, dz, count * sizeof *dz);
    else if (job->grad_dtype == BF16)
        for (int64_t j = 0; j < count; j++)
            ((uint16_t *)into)[j] = to_bf16(dz[j]);
    else
        for (int64_t j = 0; j < count; j++)
            ((uint16_t *)into)[j] = to_f16(dz[j]);
}

static void differentiate(const Job *job, int64_t n)
{
    int64_t item = job->grad_dtype == FP32 ? 4 : 2, t = job->first[n];
    char *into = (char *)job->grad + n * job->all_columns * item;
    int64_t written = 0;
    float buffer[BLOCK], dz[BLOCK];
    const char *row = row_start(job, n);
    for (; t >= 0 && written < job->columns; written += BLOCK) {
        int64_t count = job->columns - written < BLOCK ? job->columns - written : BLOCK;
        const float *z = load(job, row, written, count, buffer);
        memset(dz, 0, sizeof dz);
        for (int64_t k = t; k >= 0; k = job->next[k]) {
            int64_t at = job->y[k] - written;
            add_token(job, k, z, padded(count), dz);
            if (at >= 0 && at < count)
                dz[at] += job->on_target[k];
        }
        to_dx(job, z, padded(count), dz);
        store(job, into + written * item, dz, count);
    }
    written = written < job->columns ? written : job->columns;
    memset(into + written * item, 0, (job->all_columns - written) * item);
}

static void take_tokens(void *shared)
{
    Job *job = shared;
    for (;;) {
        int64_t from = __atomic_fetch_add(&job->cursor, job->grain, __ATOMIC_RELAXED);
        for (int64_t t = from; t < from + job->grain && t < job->units; t++)
            score(job, t);
        if (from + job->grain >= job->units)
            return;
    }
}

static void take_rows(void *shared)
{
    Job *job = shared;
    for (;;) {
        int64_t from = __atomic_fetch_add(&job->cursor, job->grain, __ATOMIC_RELAXED);
        for (int64_t n = from; n < from + job->grain && n < job->units; n++)
            differentiate(job, n);
        if (from + job->grain >= job->units)
            return;
    }
}

void raise_token_stats(Job *job, int64_t threads)
{
    run_on_threads(take_tokens, job, threads);
}

void raise_token_stats_backward(Job *job, int64_t threads)
{
    for (int64_t n = 0; n < job->rows; n++)
        job->first[n] = -1;
    /* From the last, so that a row's list has its tokens in order. */
    for (int64_t t = job->tokens - 1; t >= 0; t--) {
        int64_t n = job->row_of ? job->row_of[t] : t;
        int live = job->on_p[t] != 0 || job->on_p_logp[t] != 0 || job->everywhere[t] != 0 || job->on_target[t] != 0;
        if (!live || n < 0 || n >= job->rows || job->y[t] < 0 || job->y[t] >= job->columns)
            continue;
        job->next[t] = job->first[n];
        job->first[n] = t;
    }
    run_on_threads(take_rows, job, threads);
}

_Static_assert(sizeof(float) == 4 && sizeof(void *) == 8, "fp32 floats and 64-bit addresses");
