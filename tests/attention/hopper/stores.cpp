// Prints which m_blocks are stored as boxes by `plan.cuh`, compiled for the host: for each case on standard input, a line
//     <packed> <keys before the first query> <keys of the document> <m_blocks of the same rows> <m_blocks>
// a line with `<first row> <0 or 1>` of each m_block, those of the first query's on.
#include <cstdio>

#include "plan.cuh"

int main() {
    int packed, before, length, pack_gqa, m_blocks;
    while (std::scanf("%d %d %d %d %d", &packed, &before, &length, &pack_gqa, &m_blocks) == 5) {
        const int first = divide(before, TOKENS) * pack_gqa;
        for (int m_block = first; m_block < first + m_blocks; m_block++) {
            const int row = row_of(m_block, pack_gqa);
            const bool box = packed ? before ? stores_box<true, true>(row, before, length)
                                             : stores_box<true, false>(row, 0, length)
                                    : before ? stores_box<false, true>(row, before, length)
                                             : stores_box<false, false>(row, 0, length);
            std::printf("%d %d ", row, box);
        }
        std::printf("\n");
    }
    return 0;
}
