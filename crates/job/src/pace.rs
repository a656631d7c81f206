//! Speed limits: a token bucket on copied bytes.
