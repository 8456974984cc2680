// What lies between the matrix products of a layer, apart from attention. Included as vectors.h is.

// x += delta, if there is one; then out = x / rms(x) * weight. Shapes: (rows, width), weight (width).
template <typename Number>
void add_norm(void *x_, const void *delta_, const void *weight_, float eps, void *out_, long rows, long width) {
    Number *x = (Number *)x_, *out = (Number *)out_;
    const Number *delta = (const Number *)delta_, *weight = (const Number *)weight_;
#pragma omp parallel for if (rows * width > FEW_NUMBERS)
    for (long row = 0; row < rows; ++row) {
        Number *here = x + row * width, *to = out + row * width;
        Vector squares = all(0);
        for (long at = 0; at < width; at += LANES) {
            const long count = width - at;
            if (delta) store(here + at, load(here + at, count) + load(delta + row * width + at, count), count);
            const Vector number = load(here + at, count);
            squares += number * number;
        }
        const float scale = 1.0f / sqrtf(sum(squares) / width + eps);
        for (long at = 0; at < width; at += LANES)
            store(to + at, load(here + at, width - at) * scale * load(weight + at, width - at), width - at);
    }
}

// out = silu(gate) * up. Shapes: gate and up side by side (rows, 2 width) -> (rows, width).
template <typename Number> void gate(const void *gate_up, void *out, long rows, long width) {
#pragma omp parallel for if (rows * width > FEW_NUMBERS)
    for (long row = 0; row < rows; ++row) {
        const Number *gates = (const Number *)gate_up + row * 2 * width, *ups = gates + width;
        for (long at = 0; at < width; at += LANES) {
            const Vector gate = load(gates + at, width - at), up = load(ups + at, width - at);
            store((Number *)out + row * width + at, gate / (1.0f + exponential(-gate)) * up, width - at);
        }
    }
}

// One head's 2 * half numbers, normed where there is a weight for it, and rotated by the angles of a position.
template <typename Number>
INLINE void rotate(const Number *from, Number *to, const Number *cos, const Number *sin, const Number *norm, float eps,
                   long half) {
    float scale = 1.0f;
    if (norm) {
        Vector squares = all(0);
        for (long at = 0; at < 2 * half; at += LANES) {
            const Vector number = load(from + at, 2 * half - at);
            squares += number * number;
        }
        scale = 1.0f / sqrtf(sum(squares) / (2 * half) + eps);
    }
    for (long at = 0; at < half; at += LANES) {
        const long count = half - at;
        Vector first = load(from + at, count), second = load(from + half + at, count);
        if (norm) {
            first *= scale * load(norm + at, count);
            second *= scale * load(norm + half + at, count);
        }
        const Vector c = load(cos + at, count), s = load(sin + at, count);
        store(to + at, first * c - second * s, count);
        store(to + half + at, second * c + first * s, count);
    }
}

// Queries are rotated, and keys into their cells; values are copied to theirs.
template <typename Number> void rotate_and_write(const RotateAndWrite &a) {
    const Number *fused = (const Number *)a.fused, *cos = (const Number *)a.cos, *sin = (const Number *)a.sin;
    const Number *query_norm = (const Number *)a.query_norm, *key_norm = (const Number *)a.key_norm;
    Number *queries = (Number *)a.queries, *keys = (Number *)a.keys, *values = (Number *)a.values;
    const long heads = a.heads, kv_heads = a.kv_heads, width = a.head_dim, half = width / 2;
    const long fused_width = (heads + 2 * kv_heads) * width, cell_width = kv_heads * width;
#pragma omp parallel for if (a.rows * fused_width > FEW_NUMBERS)
    for (long row = 0; row < a.rows; ++row) {
        const Number *from = fused + row * fused_width;
        const Number *c = cos + a.positions[row] * half, *s = sin + a.positions[row] * half;
        for (long head = 0; row < a.query_rows && head < heads; ++head)
            rotate(from + head * width, queries + (row * heads + head) * width, c, s, query_norm, a.eps, half);
        const long cell = a.cells[row] * cell_width;
        for (long head = 0; head < kv_heads; ++head)
            rotate(from + (heads + head) * width, keys + cell + head * width, c, s, key_norm, a.eps, half);
        memcpy(values + cell, from + (heads + kv_heads) * width, cell_width * sizeof(Number));
    }
}
