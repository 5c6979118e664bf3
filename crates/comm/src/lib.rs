//! Collectives between ranks, exact reductions and the traffic ledger.
