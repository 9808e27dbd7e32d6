// Prints what the work items of `n_blocks.cuh`, compiled for the host, work on. Standard input has
//     <1: a packed document, 0: not> <rows> <heads> <items (of a document: of a head)>
//     <tiles, segments, batches of four levels each> <rows of a segment> <heads of a wave>
// and eight integers for each head's rule. A line for each chunk that some row sees:
//     <head> <segment, -1: whole> <part> <first key> <first row> <row after the last>
// and for each small block of it its first key and the row after the last that sees it.
#include <cstdio>
#include <vector>

#include "n_blocks.cuh"

static void print_tile(int head, int level, int tile, int segment, int part, int length, int low, int high,
                       const Rule& rule) {
    const int num_blocks = (length + BLOCK - 1) / BLOCK;
    for (int c = 0; c < N_BLOCKS; c++) {
        const int index = tile * N_BLOCKS + c;
        const Run run = n_block_run(index, level, num_blocks, low, high, rule);
        if (run.begin >= run.end) continue;
        std::printf("%d %d %d %d %d %d", head, segment, part + index, run.key, run.begin, run.end);
        for (int j = 0; BLOCK < KEYS && j < ENTRIES; j++) {
            const LevelBlock block = level_block(index * ENTRIES + j, level, num_blocks, rule);
            if (block.exists) std::printf(" %d %d", block.block * BLOCK, block.until * BLOCK);
        }
        std::printf("\n");
    }
}

int main() {
    int packed, length, heads, items;
    Columns columns = {};
    if (std::scanf("%d %d %d %d", &packed, &length, &heads, &items) != 4) return 1;
    for (int* field : {columns.tiles, columns.segments, columns.batches})
        for (int i = 0; i < 4; i++)
            if (std::scanf("%d", field + i) != 1) return 1;
    if (std::scanf("%d %d", &columns.segment_rows, &columns.wave) != 2) return 1;
    std::vector<int> table(heads * TABLE);
    for (int& x : table)
        if (std::scanf("%d", &x) != 1) return 1;
    const int high = (length + TOKENS - 1) / TOKENS * TOKENS, num_blocks = (length + BLOCK - 1) / BLOCK;
    if (packed) {
        for (int head = 0; head < heads; head++)
            for (int nth = 0; nth < items; nth++) {
                const Rule rule = load_rule(&table[head * TABLE]);
                const LevelTile tile = document_tile(nth, num_blocks, rule);
                if (tile.level >= 0) print_tile(head, tile.level, tile.index, -1, 0, length, 0, high, rule);
            }
        return 0;
    }
    for (int item = 0; item < items; item++) {
        const WorkItem work = locate_item(item, heads, columns);
        if (work.first >= work.last) continue;
        const bool is_divided = columns.segments[work.level] > 1;
        const int low = is_divided ? work.segment * columns.segment_rows : 0;
        const int part = is_divided ? first_partial(work.level, columns) : 0;
        for (int tile = work.first; tile < work.last; tile++)
            print_tile(work.group, work.level, tile, is_divided ? work.segment : -1, part, length, low,
                       is_divided ? minimum(low + columns.segment_rows, high) : high,
                       load_rule(&table[work.group * TABLE]));
    }
    return 0;
}
