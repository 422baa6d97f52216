/* Elementwise functions that compilers turn into vector code. Each is the same expression for every element,
 * so that a value does not depend on its place. NaN stays NaN. */
#ifndef RAISE_VECTOR_MATH_H
#define RAISE_VECTOR_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Elements that loops take at a time: whole vectors of every machine, so that no loop has a remainder. */
#define LANES 64
#define INLINE static inline __attribute__((always_inline))

/* e^x is 0 below this: the smallest normal number is above e^-87.34. */
#define EXP_LOWEST -87.33f

INLINE float as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t as_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* x, or 0 where it is not to be kept. By bits: compilers make branches of choices that share a condition. */
INLINE float keep(int wanted, float x)
{
    return as_float(as_bits(x) & -(uint32_t)wanted);
}

/* e^x for x <= 88, 0 below EXP_LOWEST: 2^n e^r with n = round(x / log 2) and a polynomial of relative error
 * 3e-9 for |r| <= log(2) / 2. log 2 comes in two parts, the first short enough for n times it to be exact. */
INLINE float fast_exp(float x)
{
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: the sum has no room for a fraction */
    float shifted = x * 1.44269504f + to_integer;
    float n = shifted - to_integer;
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 0.0083687454f + r * 0.0013814539f;
    p = 0.16666521f + r * (0.041668389f + r * p);
    p = 1.0f + r * (1.0f + r * (0.49999994f + r * p));
    /* Multiplied, not added to the exponent: NaN must stay NaN. */
    p *= as_float((as_bits(shifted) << 23) + 0x3f800000u);
    return x < EXP_LOWEST ? 0.0f : p;
}

/* tanh x. Near 0, where the quotient would cancel, a fit of (tanh x / x - 1) / x^2 of error 2e-10. */
INLINE float fast_tanh(float x)
{
    float w = x * x;
    float p = 0.0217007026f + w * (-0.0081773978f + w * 0.0021429618f);
    p = -0.333333313f + w * (0.133332059f + w * (-0.0539467633f + w * p));
    float t = fast_exp(-2.0f * fabsf(x));
    float far = copysignf(1.0f - 2.0f * t / (1.0f + t), x); /* rounded at 1 but once */
    return w < 0.390625f ? x + x * w * p : far;
}

INLINE float from_bf16(uint16_t h)
{
    return as_float((uint32_t)h << 16);
}

/* Rounds to nearest, ties to even. */
INLINE uint16_t to_bf16(float x)
{
    uint32_t u = as_bits(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (uint16_t)(x == x ? rounded : 0x7fc0u);
}

INLINE float from_f16(uint16_t h)
{
    uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    /* Infinities and NaN take the largest exponent; subnormals lose the leading one that they do not have. */
    uint32_t wide = magnitude + (magnitude >= 0x0f800000u ? 0x70000000u : 0x38000000u);
    float small = as_float(magnitude + 0x38800000u) - as_float(0x38800000u);
    return as_float((magnitude < 0x00800000u ? as_bits(small) : wide) | sign);
}

/* Rounds to nearest, ties to even. */
INLINE uint16_t to_f16(float x)
{
    uint32_t sign = (as_bits(x) >> 16) & 0x8000u;
    uint32_t u = as_bits(x) & 0x7fffffffu;
    uint32_t normal = (u + 0x0fffu + ((u >> 13) & 1u) - 0x38000000u) >> 13;
    /* Adding 1/2 leaves as many fraction bits as a subnormal has. */
    uint32_t subnormal = as_bits(as_float(u) + 0.5f) - 0x3f000000u;
    uint32_t h = u < 0x38800000u ? subnormal : normal;
    h = u >= 0x477ff000u ? 0x7c00u : h;
    h = u > 0x7f800000u ? 0x7e00u : h;
    return (uint16_t)(h | sign);
}

#endif
