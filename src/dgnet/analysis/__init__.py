"""What connectivity a network has learned (§6.5): statistics over a data set, the paper's figures, pages to explore."""
