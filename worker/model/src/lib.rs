//! Models as SPMD programs, placements, and the lowering to a flat op list.
