// 2^f for |f| <= 1/2 as polynomials in f, constant term first.
#pragma once

namespace lift_fast {

// Of degree 6, for attention and the pair losses, to about 1e-7 of itself; words.h evaluates it.
constexpr float kExp2[] = {1.f,
                           0.6931472067028323f,
                           0.2402265092228826f,
                           0.055503272266708814f,
                           0.009618056678584931f,
                           0.001340042817725558f,
                           0.00015461444676459477f};

// Of degree 5, one step less, for the activations of the MLP: 9e-8 of itself there.
constexpr float kExp2Degree5[] = {1.f,
                                  0.6931470036506653f,
                                  0.24022242426872253f,
                                  0.05550733581185341f,
                                  0.009671512991189957f,
                                  0.001326472731307149f};

}  // namespace lift_fast
