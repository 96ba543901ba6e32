"""Pictures of MuJoCo scenes: by OpenGL, or by casting rays on the CPU."""
