"""Recurrent layers (RNN, LSTM, GRU) over whole sequences: reference, native CPU and GPU kernels."""
