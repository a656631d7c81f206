//! A decorator that makes any store fail, wait, tear and forget, on purpose and by a script.
