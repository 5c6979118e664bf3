//! Layers with explicit backward, router, experts and transformer, generic over the backend.
