// Chunks of 64 keys: where they lie and which queries see them; see `n_blocks.py`, whose arithmetic this is. Nothing here
// needs a GPU, so that tests can compile it for the host.
//
// Constants: BLOCK, LEVELS, SINKS; see `problem.py`.
#pragma once

#include "params.cuh"
#include "plan.cuh"

constexpr int CHUNK = 64;
constexpr int WIDEST = SINKS ? LEVELS + 1 : LEVELS;  // sinks are a level of their own
constexpr int CHUNKS = 4;  // of a work item

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

struct ChunkBlock {
    int block, until;  // and the query block after the last one that sees it
    bool exists;
};

// The `nth` key block of a level that belongs to no wider one.
DEVICE ChunkBlock chunk_block(int nth, int level, int num_blocks, const Rule& rule) {
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

// The `index`-th chunk of a level, and which query rows in [low, high) see it. A chunk is a part of a block, or the
// next CHUNK / BLOCK blocks of the level; then the run is that of any of them, and the first key one that a row of it
// sees.
DEVICE Run chunk_run(int index, int level, int num_blocks, int low, int high, const Rule& rule) {
    if (BLOCK >= CHUNK) {
        const ChunkBlock own = chunk_block(index / PARTS, level, num_blocks, rule);
        const int key = own.block * BLOCK + index % PARTS * CHUNK;
        const int begin = maximum(key, low), end = minimum(own.until * BLOCK, high);
        if (own.exists && begin < end) return {key, begin, end};
        return {high, high, high};
    }
    Run run = {high, high, 0};
#pragma unroll
    for (int j = 0; j < ENTRIES; j++) {
        const ChunkBlock own = chunk_block(index * ENTRIES + j, level, num_blocks, rule);
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

// Items of CHUNKS chunks that so many blocks of a level make.
DEVICE int items_of(int blocks) { return (blocks * PARTS + CHUNKS * ENTRIES - 1) / (CHUNKS * ENTRIES); }

struct LevelTile {
    int level, index;
};

// A document's `tile`-th item, sinks first, then the widest level; level < 0: a spare.
DEVICE LevelTile chunk_tile(int tile, int num_blocks, const Rule& rule) {
    if (SINKS) {
        const int tiles = items_of(minimum(rule.sinks, num_blocks));
        if (tile < tiles) return {LEVELS + 1, tile};
        tile -= tiles;
    }
#pragma unroll
    for (int level = LEVELS; level >= 0; level--) {
        const int tiles = items_of(members_of(level, num_blocks, rule) - members_of(level + 1, num_blocks, rule));
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
        const int a_head = divide(columns.tiles[level] + batch - 1, batch);
        const int a_segment = a_head * columns.wave, size = a_segment * columns.segments[level];
        if (item < size) {
            const int segment = divide(item, a_segment), rest = item - segment * a_segment;
            const int head = divide(rest, a_head), first = (rest - head * a_head) * batch;
            const int group = turn * columns.wave + head;
            const int last = group < groups ? minimum(first + batch, columns.tiles[level]) : first;
            return {level, columns.segments[level] - 1 - segment, group, first, last};
        }
        item -= size;
    }
    return {0, 0, 0, 0, 0};
}

// First part of a level: those of wider levels that are divided into segments come before, CHUNKS a tile.
DEVICE int part_begin(int level, const Columns& columns) {
    int begin = 0;
#pragma unroll
    for (int other = 1; other <= WIDEST; other++)
        if (level < other && columns.segments[other] > 1) begin += CHUNKS * columns.tiles[other];
    return begin;
}
