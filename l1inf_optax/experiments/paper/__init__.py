"""The paper's tables and figures, one module each.

- `regression`: Table 1 and Figure 1 (Section 5.1);
- `classification`: Table 2 and Figures 2 and 3 (Section 5.2);
- `cifar10`: Figure 4 (Section 5.3);
- `select_c`: Figure 5 (Section 5.4), and a c for each layer, which Section 6 asks for;
- `regularizers`: Table 3 (Section 5.5);
- `mnist`: the second column of that table, for every c;
- `figures`: the figure that three of them draw.
"""
