// Prints `n_block_run` of `n_blocks.cuh`, compiled for the host: for each case on standard input, a line with
//     <rows of the document> <first row> <row after the last> <n_blocks> <the head's rule, 8 integers>
// a line with key, begin and end of as many n_blocks of every level.
#include <cstdio>

#include "n_blocks.cuh"

int main() {
    int length, low, high, count, table[TABLE];
    while (std::scanf("%d %d %d %d", &length, &low, &high, &count) == 4) {
        for (int& x : table)
            if (std::scanf("%d", &x) != 1) return 1;
        const Rule rule = load_rule(table);
        for (int level = 0; level <= WIDEST; level++)
            for (int index = 0; index < count; index++) {
                const Run run = n_block_run(index, level, (length + BLOCK - 1) / BLOCK, low, high, rule);
                std::printf("%d %d %d ", run.key, run.begin, run.end);
            }
        std::printf("\n");
    }
    return 0;
}
