"""Where a network's time goes and how far two of its graphs drift apart, layer by layer."""
