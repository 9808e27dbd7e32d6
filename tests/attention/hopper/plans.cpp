// Prints the plans of `plan.cuh`, compiled for the host: for each case on standard input, a line with
//     <first m_block> <m_blocks of the same rows> <rows of the document> <the head's rule, 8 integers>
// a line with the numbers of edges and of other key tiles, then for each entry of the partial n_blocks
//     <first key, -1: does not exist> <bits of the consumers that see it>
// and the first key of each entry of the others (-1 likewise), taken from their ranges as `load_tiles` does.
#include <cstdio>

#include "plan.cuh"

int main() {
    int m_block, pack_gqa, length, table[TABLE];
    while (std::scanf("%d %d %d", &m_block, &pack_gqa, &length) == 3) {
        for (int& x : table)
            if (std::scanf("%d", &x) != 1) return 1;
        const Rule rule = load_rule(table);
        const Plan plan = plan_tile(m_block, pack_gqa, length, rule);
        std::printf("%d %d", plan.num_partial, plan.num_full);
        for (int nth = 0; nth < plan.num_partial * ENTRIES; nth++) {
            const Entry entry = partial_entry(plan, nth);
            int seen = 0;
            for (int c = 0; c < CONSUMERS; c++) seen |= sees(plan, entry, row_of(m_block + c, pack_gqa), rule) << c;
            std::printf(" %d %d", entry.exists ? entry.key : -1, seen);
        }
        for (int nth = 0; nth < plan.num_full * ENTRIES; nth++) {
            int of_range = nth / ENTRIES;
            const Range range = pick(of_range, plan.far, plan.near, plan.sinks, plan.window);
            const Entry entry = entry_of(range, of_range, nth);
            std::printf(" %d", entry.exists ? entry.key : -1);
        }
        std::printf("\n");
    }
    return 0;
}
