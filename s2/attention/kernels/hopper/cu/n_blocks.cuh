// n_blocks of 64 keys: where they lie and which queries see them. The same arithmetic as in `n_blocks.py`, but for the
// order of items (no `few`). Nothing here needs a GPU, so that tests can compile it for the host.
//
// Constants: BLOCK, LEVELS, SINKS; see `problem.py`.
#pragma once

#include "params.cuh"
#include "plan.cuh"

constexpr int WIDEST = SINKS ? LEVELS + 1 : LEVELS;  // sinks are a level of their own
constexpr int N_BLOCKS = 4;                          // of a work item

struct Stride {
    int stride, residue;
};

// A level's, wider ones have higher numbers; level 0 is the local window, to which every block belongs.
DEVICE Stride stride_of(int level, const Rule& rule) {
    if (LEVELS >= 2 && level == 2) return {rule.far_stride, rule.far_residue};
    if (LEVELS >= 1 && level == 1) return {rule.near_stride, rule.near_residue};
    return {1, 0};
}

// Blocks that belong to a level.
DEVICE int members_of(int level, int num_blocks, const Rule& rule) {
    if (level > LEVELS) return 0;
    const Stride own = stride_of(level, rule);
    return members_below(num_blocks, own.stride, own.residue);
}

struct LevelBlock {
    int block, until;  // and the query block after the last one that sees it
    bool exists;
};

// The `nth` key block of a level that belongs to no wider one.
DEVICE LevelBlock level_block(int nth, int level, int num_blocks, const Rule& rule) {
    int count = SINKS ? minimum(rule.sinks, num_blocks) : 0;
    if (level <= LEVELS) count = members_of(level, num_blocks, rule) - members_of(level + 1, num_blocks, rule);
    if (nth >= count) return {0, 0, false};
    int block = nth;
    if (level <= LEVELS) {
        const Stride own = stride_of(level, rule);
        int unit = nth;
        if (level < LEVELS) {  // skip every `ratio`-th, which belongs to the next level
            const Stride wider = stride_of(level + 1, rule);
            const int ratio = divide(wider.stride, own.stride);
            const int skip = divide(wider.residue - own.residue, own.stride);
            const int keep = maximum(ratio - 1, 1);
            const int past = maximum(nth - skip, 0), turns = divide(past, keep);
            if (nth >= skip) unit = skip + turns * ratio + 1 + past - turns * keep;
        }
        block = own.residue + unit * own.stride;
        if (SINKS && block < rule.sinks) return {0, 0, false};  // of the sinks' level
    }
    return {block, minimum(block + reach_of(block, rule), num_blocks), true};
}

struct Run {
    int key, begin, end;  // first key, and the query rows that see it; all three `high` where there are none
};

// The `index`-th n_block of a level, and the query rows in [low, high) that see it. An n_block is a part of a block, or
// the next KEYS / BLOCK blocks of the level: then the run spans the runs of all, and the key is the first of the blocks
// that have one.
DEVICE Run n_block_run(int index, int level, int num_blocks, int low, int high, const Rule& rule) {
    if (BLOCK >= KEYS) {
        const LevelBlock own = level_block(index / PARTS, level, num_blocks, rule);
        const int key = own.block * BLOCK + index % PARTS * KEYS;
        const int begin = maximum(key, low), end = minimum(own.until * BLOCK, high);
        if (own.exists && begin < end) return {key, begin, end};
        return {high, high, high};
    }
    Run run = {high, high, 0};
#pragma unroll
    for (int j = 0; j < ENTRIES; j++) {
        const LevelBlock own = level_block(index * ENTRIES + j, level, num_blocks, rule);
        const int begin = maximum(own.block * BLOCK, low), end = minimum(own.until * BLOCK, high);
        if (own.exists && begin < end) {
            run.key = minimum(run.key, own.block * BLOCK);
            run.begin = minimum(run.begin, begin);
            run.end = maximum(run.end, end);
        }
    }
    if (run.begin >= run.end) run.end = high;
    return run;
}

// Tiles of N_BLOCKS n_blocks in so many blocks of a level.
DEVICE int count_tiles(int blocks) { return (blocks * PARTS + N_BLOCKS * ENTRIES - 1) / (N_BLOCKS * ENTRIES); }

struct LevelTile {
    int level, index;
};

// A document's `tile`-th tile, sinks first, then the widest level; level < 0: there is none.
DEVICE LevelTile document_tile(int tile, int num_blocks, const Rule& rule) {
    if (SINKS) {
        const int tiles = count_tiles(minimum(rule.sinks, num_blocks));
        if (tile < tiles) return {LEVELS + 1, tile};
        tile -= tiles;
    }
#pragma unroll
    for (int level = LEVELS; level >= 0; level--) {
        const int tiles = count_tiles(members_of(level, num_blocks, rule) - members_of(level + 1, num_blocks, rule));
        if (tile < tiles) return {level, tile};
        tile -= tiles;
    }
    return {-1, 0};
}

struct WorkItem {
    int level, segment, group, first, last;  // group: batch x KV head; tiles from `first` on before `last`
};

// Items come in waves of heads, whose queries the L2 cache holds; of a wave the widest level first, and of a level its
// late segments.
DEVICE WorkItem locate_item(int item, int groups, const Columns& columns) {
    int items = 0;
#pragma unroll
    for (int level = 0; level <= WIDEST; level++)
        items += divide(columns.tiles[level] + columns.batches[level] - 1, columns.batches[level]) *
                 columns.segments[level] * columns.wave;
    const int turn = divide(item, items);
    item -= turn * items;
#pragma unroll
    for (int level = WIDEST; level >= 0; level--) {
        const int batch = columns.batches[level];
        const int per_head = divide(columns.tiles[level] + batch - 1, batch);
        const int per_segment = per_head * columns.wave, size = per_segment * columns.segments[level];
        if (item < size) {
            const int segment = divide(item, per_segment), rest = item - segment * per_segment;
            const int head = divide(rest, per_head), first = (rest - head * per_head) * batch;
            const int group = turn * columns.wave + head;
            const int last = group < groups ? minimum(first + batch, columns.tiles[level]) : first;
            return {level, columns.segments[level] - 1 - segment, group, first, last};
        }
        item -= size;
    }
    return {0, 0, 0, 0, 0};
}

// Number of a level's first n_block in the workspace, where those of wider levels that are divided come before.
DEVICE int first_partial(int level, const Columns& columns) {
    int begin = 0;
#pragma unroll
    for (int other = 1; other <= WIDEST; other++)
        if (level < other && columns.segments[other] > 1) begin += N_BLOCKS * columns.tiles[other];
    return begin;
}
