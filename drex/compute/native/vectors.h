// Vectors of LANES float32, exp, and the numbers that kernels read and write as such vectors: float32 and bfloat16.
//
// kernels.cpp includes this file once for each instruction set, each time in another namespace and with its LANES.

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));
typedef uint16_t Upper __attribute__((vector_size(2 * LANES)));

// The upper half of a float32.
struct bfloat16 {
    uint16_t bits;
};

INLINE Vector all(float x) { return x - (Vector){}; }

// Of LANES numbers `count` are read; the others are zero.
INLINE Vector load(const float *from, long count = LANES) {
    Vector out = all(0);
    if (count >= LANES)
        memcpy(&out, from, sizeof out);
    else
        memcpy(&out, from, count * sizeof *from);
    return out;
}

INLINE Vector load(const bfloat16 *from, long count = LANES) {
    Upper upper = {};
    if (count >= LANES)
        memcpy(&upper, from, sizeof upper);
    else
        memcpy(&upper, from, count * sizeof *from);
    return (Vector)(__builtin_convertvector(upper, Bits) << 16);
}

INLINE void store(float *to, Vector x, long count = LANES) {
    if (count >= LANES)
        memcpy(to, &x, sizeof x);
    else
        memcpy(to, &x, count * sizeof *to);
}

// Rounded to the nearest, ties to even. NaN stays NaN, since none that comes from bfloat16 has low bits to carry.
INLINE void store(bfloat16 *to, Vector x, long count = LANES) {
    const Bits bits = (Bits)x;
    const Upper upper = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Upper);
    if (count >= LANES)
        memcpy(to, &upper, sizeof upper);
    else
        memcpy(to, &upper, count * sizeof *to);
}

INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }
INLINE Vector smaller(Vector a, Vector b) { return a < b ? a : b; }

INLINE float sum(Vector x) {
    float out = 0;
    for (int lane = 0; lane < LANES; ++lane) out += x[lane];
    return out;
}

INLINE float largest(Vector x) {
    float out = x[0];
    for (int lane = 1; lane < LANES; ++lane) out = x[lane] > out ? x[lane] : out;
    return out;
}

// exp, to two units in the last place, by the polynomial of the Cephes library; 0 below -87, where float32 ends.
INLINE Vector exponential(Vector x) {
    const Vector lowest = all(-87.0f), highest = all(88.0f), rounder = all(12582912.0f);
    Vector inside = x < lowest ? lowest : x;
    inside = inside > highest ? highest : inside;
    Vector power = (inside * 1.44269504088896341f + rounder) - rounder;
    Vector rest = inside - power * 0.693359375f + power * 2.12194440e-4f;
    Vector out = all(1.9875691500e-4f);
    out = out * rest + 1.3981999507e-3f;
    out = out * rest + 8.3334519073e-3f;
    out = out * rest + 4.1665795894e-2f;
    out = out * rest + 1.6666665459e-1f;
    out = out * rest + 5.0000001201e-1f;
    out = out * rest * rest + rest + 1.0f;
    Whole exponent = (__builtin_convertvector(power, Whole) + 127) << 23;
    return x < lowest ? all(0) : out * (Vector)exponent;
}

// Of pairs of vectors a and b, each made of groups of 2 * width numbers: the sums of the groups' halves, in order.
template <int width, int... lane> INLINE Vector add_halves(Vector a, Vector b, std::integer_sequence<int, lane...>) {
    return __builtin_shuffle(a, b, (Whole){(lane / width * 2 * width + lane % width)...}) +
           __builtin_shuffle(a, b, (Whole){(lane / width * 2 * width + lane % width + width)...});
}

template <int count, int width> INLINE void add_up(Vector *x) {
    for (int pair = 0; pair < count / 2; ++pair)
        x[pair] = add_halves<width>(x[2 * pair], x[2 * pair + 1], std::make_integer_sequence<int, LANES>());
    if constexpr (width > 1) add_up<count / 2, width / 2>(x);
}

// The sums of LANES vectors, which are overwritten, in their order.
INLINE Vector sums(Vector (&x)[LANES]) {
    add_up<LANES, LANES / 2>(x);
    return x[0];
}
