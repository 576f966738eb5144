/* The intrinsics of ARM's NEON that kernels.c calls, for gcc and clang on any machine, to test that part of the file. */
#include <stdint.h>
#include <string.h>

#define VECTOR __attribute__((vector_size(16)))
#define EMULATED static inline __attribute__((unused))
typedef uint8_t uint8x16_t VECTOR;
typedef uint16_t uint16x8_t VECTOR;
typedef uint32_t uint32x4_t VECTOR;
typedef int32_t int32x4_t VECTOR;
typedef float float32x4_t VECTOR;

EMULATED uint16x8_t vdupq_n_u16(uint16_t v) { return (uint16x8_t){v, v, v, v, v, v, v, v}; }
EMULATED uint32x4_t vdupq_n_u32(uint32_t v) { return (uint32x4_t){v, v, v, v}; }
EMULATED int32x4_t vdupq_n_s32(int32_t v) { return (int32x4_t){v, v, v, v}; }
EMULATED float32x4_t vdupq_n_f32(float v) { return (float32x4_t){v, v, v, v}; }

EMULATED uint32x4_t vld1q_u32(const uint32_t *p) {
    uint32x4_t v;
    memcpy(&v, p, 16);
    return v;
}
EMULATED float32x4_t vld1q_f32(const float *p) {
    float32x4_t v;
    memcpy(&v, p, 16);
    return v;
}
EMULATED void vst1q_s32(int32_t *p, int32x4_t v) { memcpy(p, &v, 16); }
EMULATED void vst1q_f32(float *p, float32x4_t v) { memcpy(p, &v, 16); }

EMULATED uint8x16_t vreinterpretq_u8_u32(uint32x4_t v) { return (uint8x16_t)v; }
EMULATED int32x4_t vreinterpretq_s32_u32(uint32x4_t v) { return (int32x4_t)v; }
EMULATED uint32x4_t vandq_u32(uint32x4_t a, uint32x4_t b) { return a & b; }
EMULATED uint32x4_t veorq_u32(uint32x4_t a, uint32x4_t b) { return a ^ b; }
EMULATED uint32x4_t vtstq_u32(uint32x4_t a, uint32x4_t b) { return (uint32x4_t)((a & b) != 0); }
EMULATED int32x4_t vaddq_s32(int32x4_t a, int32x4_t b) { return a + b; }
EMULATED int32x4_t vsubq_s32(int32x4_t a, int32x4_t b) { return a - b; }
EMULATED float32x4_t vfmaq_n_f32(float32x4_t a, float32x4_t b, float c) { return a + b * c; }
EMULATED float32x4_t vbslq_f32(uint32x4_t mask, float32x4_t a, float32x4_t b) {
    return (float32x4_t)((mask & (uint32x4_t)a) | (~mask & (uint32x4_t)b));
}

EMULATED uint8x16_t vcntq_u8(uint8x16_t v) {
    for (int i = 0; i < 16; i++) v[i] = (uint8_t)__builtin_popcount(v[i]);
    return v;
}
EMULATED uint16x8_t vpadalq_u8(uint16x8_t a, uint8x16_t b) {
    for (int i = 0; i < 8; i++) a[i] = (uint16_t)(a[i] + b[2 * i] + b[2 * i + 1]);
    return a;
}
EMULATED uint32x4_t vpadalq_u16(uint32x4_t a, uint16x8_t b) {
    for (int i = 0; i < 4; i++) a[i] += (uint32_t)b[2 * i] + b[2 * i + 1];
    return a;
}
