"""One page that sets runs side by side, from what training and evaluation left in their folders."""
