// What verdicts are made of, in one read of the logits. Included as vectors.h is.

// Shapes: logits (rows, vocab) -> out (COLUMNS, rows): the token of the largest logit (the first of equal ones), that
// logit, the second largest, log sum exp, and the mean of the logits under their own distribution. A logit that is no
// number makes the sum none.
template <typename Number> void summarise(const void *logits, double *out, long rows, long vocab) {
#pragma omp parallel for if (rows * vocab > FEW_NUMBERS)
    for (long row = 0; row < rows; ++row) {
        const Number *here = (const Number *)logits + row * vocab;
        float best = -INFINITY, second = -INFINITY;
        long token = 0;
        double total = 0, weighted = 0;  // of exp(logit - best), and of that times (logit - best)
        for (long begin = 0; begin < vocab; begin += BLOCK) {
            const long size = vocab - begin < BLOCK ? vocab - begin : BLOCK;
            float numbers[BLOCK];
            Vector most = all(-INFINITY), next = most;
            for (long at = 0; at < size; at += LANES) {
                Vector x = load(here + begin + at, size - at);
                for (long lane = size - at; lane < LANES; ++lane) x[lane] = -INFINITY;
                store(numbers + at, x);
                next = larger(next, smaller(most, x));
                most = larger(x, most);
            }
            const float top = largest(most);
            bool counted = false;
            for (int lane = 0; lane < LANES; ++lane) {
                const bool is_top = most[lane] == top && !counted;
                counted |= is_top;
                const float candidate = is_top ? next[lane] : most[lane];
                second = candidate > second ? candidate : second;
            }
            if (top > best) {
                second = best > second ? best : second;
                const double rise = (double)best - top;
                weighted = total == 0 ? 0 : (weighted + rise * total) * std::exp(rise);
                total = total == 0 ? 0 : total * std::exp(rise);
                best = top;
                for (token = begin; numbers[token - begin] != top;) ++token;
            } else {
                second = top > second ? top : second;
            }
            Vector masses = all(0), moments = all(0);
            for (long at = 0; at < size; at += LANES) {
                const Vector below = load(numbers + at) - best, mass = exponential(below);
                masses += mass;
                moments += mass > 0 ? mass * below : all(0);
            }
            total += sum(masses);
            weighted += sum(moments);
        }
        const double columns[COLUMNS] = {(double)token, best, second, best + std::log(total), best + weighted / total};
        for (int column = 0; column < COLUMNS; ++column) out[column * rows + row] = columns[column];
    }
}
