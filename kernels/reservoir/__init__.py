"""Reservoirs of echo-state networks: a sparse recurrent layer scanned over whole sequences."""
