// Compiled once so that the precompiled header exists.
