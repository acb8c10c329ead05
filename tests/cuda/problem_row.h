// How tests hand a problem over: one row of ints.
#ifndef GNA_TESTS_PROBLEM_ROW_H_
#define GNA_TESTS_PROBLEM_ROW_H_

#include "gna/problem.h"

constexpr int kAxisInts = 7;
constexpr int kProblemInts = 5 + gna::kMaxRank * kAxisInts;

inline gna::Axis axis_of(const int32_t* row) {
  return {row[0], row[1], row[2], row[3], row[4] != 0, row[5], row[6]};
}

inline gna::Problem problem_of(const int32_t* row) {
  gna::Problem problem;
  problem.rank = row[0];
  problem.batch = row[1];
  problem.query_heads = row[2];
  problem.kv_heads = row[3];
  problem.head_dim = row[4];
  for (int axis = 0; axis < problem.rank; ++axis) {
    problem.axes[axis] = axis_of(row + 5 + axis * kAxisInts);
  }
  return problem;
}

#endif  // GNA_TESTS_PROBLEM_ROW_H_
