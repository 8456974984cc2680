// Tokens drawn with Gumbel noise, which is a function of a row's key and a token. Included as vectors.h is.

typedef uint64_t Hashes __attribute__((vector_size(8 * LANES)));

// drex/control/hashing.py has the same numbers.
template <typename Integer> INLINE Integer mix(Integer state) {
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
    return state ^ (state >> 31);
}

// The argmax of (logit - peak) / temperature + noise, of each row. Shapes: logits (rows, vocab), the others (rows).
//
// -log(u) is at least 1 - u. So the noise -log(-log(u)) exceeds a number t only where 1 - u < exp(-t): all but a few
// tokens are told not to win by float32 that errs on the safe side, and only the others need float64 and logarithms.
template <typename Number>
void draw(const void *logits, const float *peaks, const float *temperatures, const int64_t *keys, int64_t *tokens,
          long rows, long vocab) {
    const uint64_t golden = 0x9E3779B97F4A7C15u;
#pragma omp parallel for if (rows * vocab > FEW_NUMBERS)
    for (long row = 0; row < rows; ++row) {
        const Number *here = (const Number *)logits + row * vocab;
        const uint64_t key = (uint64_t)keys[row];
        Hashes steps;
        for (int lane = 0; lane < LANES; ++lane) steps[lane] = golden * (lane + 1);
        double best = -INFINITY;
        tokens[row] = 0;
        for (long at = 0; at < vocab; at += LANES) {
            const Vector scaled = (load(here + at, vocab - at) - peaks[row]) / temperatures[row];
            const Hashes states = mix(steps + (key + golden * at));
            // The upper half of what u lacks to 1, never too large.
            const Whole upper = __builtin_convertvector(~states >> 33, Whole);
            const Vector lacking = __builtin_convertvector(upper, Vector) * 0x1p-31f;
            const Vector bound = exponential(scaled - (float)best) * 1.001f;
            const Whole possible = lacking * 0.999f < bound;
            for (int lane = 0; lane < LANES && at + lane < vocab; ++lane) {
                if (!possible[lane]) continue;
                const double u = ((double)(states[lane] >> 12) + 0.5) / 4503599627370496.0;
                const double value = (double)scaled[lane] - std::log(-std::log(u));
                if (value > best) best = value, tokens[row] = at + lane;
            }
        }
    }
}
