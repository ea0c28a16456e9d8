"""Keeps what an LSTM policy computed while acting, so that learning needs no second forward pass."""
