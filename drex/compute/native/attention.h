// Attention of a pass's short spans over the K/V pool. Included as vectors.h is.

// Queries of one request that share K/V: where they lie, where their outputs go, and how many entries each sees.
template <typename Number> struct Tile {
    const Number *queries[TILE];
    Number *outs[TILE];
    long seen[TILE];
};

// A tile of `count` queries.
//
// offsets: where the vectors of `entries` entries begin in keys and values, padded to whole vectors.
// scores: room for them, padded so, for each query.
template <int count, typename Number>
INLINE void attend_tile(const Tile<Number> &tile, const Number *keys, const Number *values, const long *offsets,
                        long entries, float *scores, float scale, long width) {
    const long room = ROUND_UP(entries);
    for (long first = 0; first < entries; first += LANES)
        for (int query = 0; query < count; ++query) {
            Vector products[LANES];
            for (int entry = 0; entry < LANES; ++entry) {
                const Number *key = keys + offsets[first + entry];
                products[entry] = all(0);
                for (long at = 0; at < width; at += LANES)
                    products[entry] += load(key + at, width - at) * load(tile.queries[query] + at, width - at);
            }
            store(scores + query * room + first, sums(products) * scale);
        }
    float inverse[count];
    for (int query = 0; query < count; ++query) {
        float *mine = scores + query * room;
        for (long entry = tile.seen[query]; entry < room; ++entry) mine[entry] = -INFINITY;
        Vector most = all(-INFINITY), total = all(0);
        for (long at = 0; at < room; at += LANES) most = larger(load(mine + at), most);
        const float top = largest(most);
        for (long at = 0; at < room; at += LANES) {
            const Vector weights = exponential(load(mine + at) - top);
            store(mine + at, weights);
            total += weights;
        }
        inverse[query] = 1.0f / sum(total);
    }
    const int parts = 4;
    for (long begin = 0; begin < width; begin += parts * LANES) {
        Vector means[count][parts] = {};
        for (long entry = 0; entry < entries; ++entry) {
            const Number *value = values + offsets[entry] + begin;
            for (int part = 0; part < parts && begin + part * LANES < width; ++part) {
                const Vector here = load(value + part * LANES, width - begin - part * LANES);
                for (int query = 0; query < count; ++query) means[query][part] += scores[query * room + entry] * here;
            }
        }
        for (int query = 0; query < count; ++query)
            for (int part = 0; part < parts && begin + part * LANES < width; ++part)
                store(tile.outs[query] + begin + part * LANES, means[query][part] * inverse[query],
                      width - begin - part * LANES);
    }
}

template <int count, typename Number>
void attend_counted(const Tile<Number> &tile, const Number *keys, const Number *values, const long *offsets,
                    long entries, float *scores, float scale, long width) {
    // The usual widths are compiled as constants.
    if (width == 64)
        attend_tile<count>(tile, keys, values, offsets, entries, scores, scale, 64);
    else if (width == 128)
        attend_tile<count>(tile, keys, values, offsets, entries, scores, scale, 128);
    else
        attend_tile<count>(tile, keys, values, offsets, entries, scores, scale, width);
}

// Where the vectors of the entries of a span begin, for one K/V head; padded to whole vectors with the last one.
INLINE void find_entries(const Attend &a, long span, long kv_head, long entries, long *offsets) {
    const long width = a.head_dim, cell_width = a.kv_heads * width, plane = a.plane * a.num_cells;
    if (a.in_run[span]) {
        for (long entry = 0; entry < entries; ++entry)
            offsets[entry] = (plane + a.starts[span] + entry) * cell_width + kv_head * width;
    } else {
        const int32_t *cells = a.cells + a.seats[span] * a.table_room;
        const bool *aliased = a.aliased + a.seats[span] * a.table_room;
        for (long entry = 0; entry < entries; ++entry)
            offsets[entry] = (cells[entry] + (aliased[entry] ? 0 : plane)) * cell_width + kv_head * width;
    }
    for (long entry = entries; entry < ROUND_UP(entries); ++entry) offsets[entry] = offsets[entries - 1];
}

template <typename Number> void attend(const Attend &a) {
    const Number *keys = (const Number *)a.keys, *values = (const Number *)a.values;
    const long width = a.head_dim, group = a.heads / a.kv_heads;
    long longest = 0, scored = 0;
    for (long span = 0; span < a.spans; ++span) {
        const long rows = a.sizes[span];
        if (rows == 0 || rows > a.longest_span) continue;
        const long entries = a.visible[a.first_rows[span] + rows - 1];
        longest = entries > longest ? entries : longest;
        scored += rows * entries;
    }
    // Few requests are split by query heads as well, so that all threads have about as much to do.
    const long splits = a.spans * a.kv_heads < FEW_ITEMS ? group : 1, heads = group / splits;
    const long items = a.spans * a.kv_heads * splits, room = ROUND_UP(longest);
#pragma omp parallel if (scored * a.heads * width > FEW_NUMBERS)
    {
        float *scores = new float[TILE * room];
        long *offsets = new long[room];
#pragma omp for schedule(dynamic)
        for (long item = 0; item < items; ++item) {
            const long span = item / (a.kv_heads * splits), kv_head = item / splits % a.kv_heads;
            const long rows = a.sizes[span], first = a.first_rows[span];
            if (rows == 0 || rows > a.longest_span) continue;
            find_entries(a, span, kv_head, a.visible[first + rows - 1], offsets);
            const long first_head = kv_head * group + item % splits * heads;
            Tile<Number> tile;
            int count = 0;
            for (long number = 0; number < rows * heads; ++number) {
                const long row = first + number / heads, head = first_head + number % heads;
                const long at = (row * a.heads + head) * width;
                tile.queries[count] = (const Number *)a.queries + at;
                tile.outs[count] = (Number *)a.out + at;
                tile.seen[count] = a.visible[row];
                if (++count < TILE && number < rows * heads - 1) continue;
                const auto run = count == 1   ? attend_counted<1, Number>
                                 : count == 2 ? attend_counted<2, Number>
                                 : count == 3 ? attend_counted<3, Number>
                                              : attend_counted<TILE, Number>;
                run(tile, keys, values, offsets, tile.seen[count - 1], scores, a.scale, width);
                count = 0;
            }
        }
        delete[] scores;
        delete[] offsets;
    }
}
