"""What connectivity a network has learned (§6.5): statistics over a data set, and the paper's figures."""
