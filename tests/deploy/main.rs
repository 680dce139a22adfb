//! What `deploy/` has: rendered, read back, and compared with what it promises.
