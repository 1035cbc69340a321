"""One file a protocol: which pictures are drawn, and which questions are asked of them."""
